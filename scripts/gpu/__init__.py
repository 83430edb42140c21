"""What `scripts/gpu_check` is made of: checks of the engine on a device, and figures beside the device's limits.

Runs where only torch, transformers and peft are: nothing here, or in what it imports, needs the web server's packages.
"""

import gpu.sorted_list  # noqa: F401  (before anything of the engine, in each process)
