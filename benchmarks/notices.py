"""Signed notifications, as the service would send them."""

from __future__ import annotations

import json
import time

from benchmarks.payloads import API_SECRET

TIMESTAMP_HEADER = "X-Cld-Timestamp"
SIGNATURE_HEADER = "X-Cld-Signature"


def build_notice(task_id: str, answer: bytes) -> tuple[bytes, dict[str, str]]:
    """Return the body and headers of the notification of a task whose result is `answer`."""
    from cloudinary_analyze.webhooks import compute_signature

    content = {
        "operation_name": "analyze",
        "notification_type": "analyze",
        "task_id": task_id,
        "http_status": 200,
        **json.loads(answer),
    }
    body = json.dumps(content, separators=(",", ":")).encode()
    now = str(int(time.time()))
    headers = {
        "Content-Type": "application/json",
        TIMESTAMP_HEADER: now,
        SIGNATURE_HEADER: compute_signature(body, now, API_SECRET),
    }
    return body, headers
