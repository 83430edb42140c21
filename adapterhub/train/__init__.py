"""Fine-tuning on the base that serves: files, data sets, the trainer, the queue of jobs.

Imports torch, `adapterhub.base` and `adapterhub.swap`; knows nothing of HTTP.
"""
