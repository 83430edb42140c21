"""What each operation answers with, for the OpenAPI document.

The routes put plain dicts together, and nothing is checked against this while the server serves: `scripts/soak openapi`
and the tests do that, with requests made up for every operation.
"""

from __future__ import annotations

from typing import Any

from adapterhub.api.answers.openai import (
    ChatCompletion,
    CheckpointObject,
    Completion,
    Deleted,
    EventObject,
    FileObject,
    JobObject,
    ModelObject,
    Models,
    Page,
    PartObject,
    UploadObject,
)
from adapterhub.api.answers.ours import (
    AdapterObject,
    Adapters,
    DryRun,
    Erased,
    ErasureObject,
    Evicted,
    ImportedAdapter,
    KeyObject,
    NewKey,
    OwnersQuota,
    QuotaObject,
    Quotas,
    Rules,
    Tiers,
    UsageObject,
    Versions,
)


def _of_adapters(prefix: str) -> dict[tuple[str, str], Any]:
    """What owners and operators both ask of adapters, each under a path of their own."""
    one = f"{prefix}/{{adapter_id}}"
    return {
        ("GET", prefix): Adapters,
        ("GET", one): AdapterObject,
        ("DELETE", one): Deleted,
        ("POST", f"{one}/pin"): AdapterObject,
        ("POST", f"{one}/unpin"): AdapterObject,
        ("GET", f"{one}/versions"): Versions,
        ("POST", f"{one}/versions/{{version}}/promote"): AdapterObject,
        ("POST", f"{one}/rollback"): AdapterObject,
        ("PUT", f"{one}/split"): AdapterObject,
        ("DELETE", f"{one}/split"): AdapterObject,
    }


# by method and path, in JSON
ANSWERS: dict[tuple[str, str], Any] = {
    ("POST", "/v1/files"): FileObject,
    ("GET", "/v1/files"): Page[FileObject],
    ("GET", "/v1/files/{file_id}"): FileObject,
    ("DELETE", "/v1/files/{file_id}"): Deleted,
    ("POST", "/v1/uploads"): UploadObject,
    ("POST", "/v1/uploads/{upload_id}/parts"): PartObject,
    ("POST", "/v1/uploads/{upload_id}/complete"): UploadObject,
    ("POST", "/v1/uploads/{upload_id}/cancel"): UploadObject,
    ("POST", "/v1/fine_tuning/jobs"): JobObject,
    ("GET", "/v1/fine_tuning/jobs"): Page[JobObject],
    ("GET", "/v1/fine_tuning/jobs/{job_id}"): JobObject,
    ("POST", "/v1/fine_tuning/jobs/{job_id}/cancel"): JobObject,
    ("POST", "/v1/fine_tuning/jobs/{job_id}/pause"): JobObject,
    ("POST", "/v1/fine_tuning/jobs/{job_id}/resume"): JobObject,
    ("GET", "/v1/fine_tuning/jobs/{job_id}/events"): Page[EventObject],
    ("GET", "/v1/fine_tuning/jobs/{job_id}/checkpoints"): Page[CheckpointObject],
    ("GET", "/v1/models"): Models,
    ("GET", "/v1/models/{name}"): ModelObject,
    ("DELETE", "/v1/models/{name}"): Deleted,
    ("POST", "/v1/chat/completions"): ChatCompletion,
    ("POST", "/v1/completions"): Completion,
    **_of_adapters("/v1/adapters"),
    ("POST", "/v1/adapters"): ImportedAdapter,
    ("POST", "/v1/adapters/{adapter_id}/prefetch"): AdapterObject,
    **_of_adapters("/admin/adapters"),
    ("POST", "/admin/adapters/{adapter_id}/evict"): Evicted,
    ("GET", "/admin/tiers"): Tiers,
    ("PATCH", "/admin/tiers"): Tiers,
    ("GET", "/admin/policy"): Rules,
    ("PUT", "/admin/policy"): Rules | DryRun,
    ("PATCH", "/admin/policy"): Rules | DryRun,
    ("POST", "/admin/keys"): NewKey,
    ("GET", "/admin/keys"): Page[KeyObject],
    ("GET", "/admin/keys/{key_id}"): KeyObject,
    ("DELETE", "/admin/keys/{key_id}"): KeyObject,
    ("POST", "/admin/keys/{key_id}/rotate"): NewKey,
    ("GET", "/v1/quotas"): QuotaObject,
    ("GET", "/admin/quotas"): Quotas,
    ("GET", "/admin/quotas/{owner}"): OwnersQuota,
    ("PATCH", "/admin/quotas/{owner}"): OwnersQuota,
    ("DELETE", "/admin/quotas/{owner}"): OwnersQuota,
    ("GET", "/v1/usage"): Page[UsageObject],
    ("GET", "/admin/usage"): Page[UsageObject],
    ("DELETE", "/admin/users/{owner}"): Erased,
    ("GET", "/admin/erasures"): Page[ErasureObject],
    ("GET", "/admin/erasures/{erasure_id}"): ErasureObject,
}
