"""Which files hold secrets: private keys, passwords and tokens, known by their names or by what stands in them.

A job's files can be read by everyone who may use the cluster, so these never travel, whatever their place or the case
of their names. Hidden files stay anyway; their names are here for `ray up`, whose manifests leave out the same.
"""

import fnmatch
import re

SECRET_NAMES = {
    "a private key": [
        *("id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*", "id_xmss*", "*_rsa", "*_dsa", "*_ecdsa", "*_ed25519"),
        *("*.pem", "*.key", "*.p12", "*.pfx", "*.p8", "*.ppk", "*.jks", "*.keystore", "*.kdbx", ".ssh", ".gnupg"),
    ],
    "the access to a cluster": ["kubeconfig", "kubeconfig.*", "kubeconfig-*", "*.kubeconfig", ".kube"],
    "credentials": [
        *("credentials", "credentials.*", "*credentials.json", "*credentials.csv", "*_accessKeys.csv"),
        *("client_secret*", "*service[-_]account*.json", ".aws", ".gcloud", ".azure", ".boto"),
        *(".git-credentials", ".netrc", "_netrc", ".pgpass", ".pypirc", ".npmrc", ".htpasswd", "htpasswd", ".docker"),
        *("auth_token", "token", "token.txt", "*.token", "kaggle.json", "rclone.conf", ".s3cfg", "*.tfstate*"),
        "*.tfvars",
    ],
    "secrets": [
        *(".env", ".env.*", "*.env", "*.env.*", "secret", "secrets", "secret.txt", "secrets.txt"),
        *(f"*{name}.{end}" for name in ("secret", "secrets") for end in ("yaml", "yml", "json", "toml", "ini", "conf")),
    ],
}
"""Names or patterns of files and folders by what they hold."""
_PUBLIC = (".pub", ".example", ".sample", ".template")
"""Ends of names of public halves of keys and of files to be filled in, which are no secrets."""
_CONTENTS = {
    "holds a private key": rb"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----(?:\\r|\\n|\s)+[A-Za-z0-9+/=]{6}",
    "holds a key of a cluster": rb"client-key-data:\s*[\"']?[A-Za-z0-9+/=]{16}",
    "holds a key of an object store": rb"(?i)aws_secret_access_key[\"']?\s*[:=]\s*[\"']?[A-Za-z0-9+/]{30}",
    "holds a password in a URI of an object store": rb"\b(?:s3|s3a|gs|abfss?)://[^\s:/@\"']+:[^\s@\"']+@",
    "is a key file of PuTTY": rb"\APuTTY-User-Key-File-",
}
_PATTERNS = [(kind, pattern.lower()) for kind, patterns in SECRET_NAMES.items() for pattern in patterns]
_READERS = [(kind, re.compile(pattern)) for kind, pattern in _CONTENTS.items()]


def secret_name(path: str) -> str | None:
    """What a file holds by the names in its path, `/` between them, or None where they say nothing of a secret."""
    for part in path.lower().split("/"):
        if part.endswith(_PUBLIC):
            continue
        for kind, pattern in _PATTERNS:
            if fnmatch.fnmatchcase(part, pattern):
                return f"{part} is named like {kind}"
    return None


def secret_content(content: bytes) -> str | None:
    """What secret stands in a file, or None."""
    return next((kind for kind, pattern in _READERS if pattern.search(content)), None)
