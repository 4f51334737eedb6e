"""The page and the policy under which a browser runs it: its own script and style, this server, and nothing else."""

import base64
import hashlib
import re
from pathlib import Path

HTML = Path(__file__).with_name("index.html").read_text(encoding="utf-8")


def _hashes(tag: str) -> str:
    """CSP sources of the inline elements of one tag, by their content."""
    bodies = re.findall(rf"<{tag}>(.*?)</{tag}>", HTML, re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(body.encode()).digest()).decode() for body in bodies]
    return " ".join(f"'sha256-{digest}'" for digest in digests)


POLICY = "; ".join(
    [
        "default-src 'none'",
        f"script-src {_hashes('script')}",
        f"style-src {_hashes('style')}",
        "connect-src 'self'",
        "img-src data: blob:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
)
