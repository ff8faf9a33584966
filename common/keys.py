"""The names under which a tenant's records are stored, and the secrets behind them.

A key is an HMAC over everything that decides what an embedding's numbers are, so equal requests meet in the
cache and nobody can compute another tenant's key without the deployment's secret.
"""

import functools
import hmac
import secrets as entropy
from collections.abc import Sequence
from dataclasses import dataclass

KEY_BYTES = 32
TAG_BYTES = 16
_MAC_BYTES = 16
# Of the records' layout. A release that raises it also reads the records of the one before, and its decoders are
# rolled out ahead of its encoders: a decoder that cannot read what is stored makes its callers encode again in vain.
SCHEMA_VERSION = 1
Crop = tuple[int, int, int, int]  # x0, y0, x1, y1 in pixels of the upright image, the last two exclusive


@dataclass(frozen=True)
class Address:
    """Where a record lives: the tenant's tag and the record's key; the stored header carries both."""

    tenant_tag: bytes
    key: bytes

    def redis_name(self, kind: str) -> str:
        """Another one for each schema, so that replicas of two releases leave each other's records and claims alone."""
        name = f"splitsam:{kind}:{self.tenant_tag.hex()}:{self.key.hex()}"
        return name if SCHEMA_VERSION == 1 else f"{name}:{SCHEMA_VERSION}"


@dataclass(frozen=True)
class EncodingVersion:
    """What, besides the image, decides an embedding's numbers."""

    model_id: str
    preprocess_version: str
    precision: str
    codec: str


class KeyRing:
    """The deployment's secrets, the current one first; older ones are still accepted while they are rotated."""

    def __init__(self, secrets: Sequence[bytes]):
        if not secrets or any(len(secret) < 16 for secret in secrets):
            raise ValueError("a deployment secret has at least 16 bytes")
        self._secrets = tuple(secrets)

    def embedding_addresses(
        self, tenant: str, image_sha256: bytes, version: EncodingVersion, crop: Crop | None = None
    ) -> list[Address]:
        """Where the embedding of an image, or of its crop, is: one address for each secret, the current one first."""
        described = (version.model_id, version.preprocess_version, version.precision, version.codec)
        parts = [tenant.encode(), image_sha256, *(text.encode() for text in described)]
        if crop is not None:
            parts += [b"crop", *(edge.to_bytes(4, "big") for edge in crop)]
        return [Address(_tenant_tag(secret, tenant), _mac(secret, b"embedding", *parts)) for secret in self._secrets]

    def addresses(self, tenant: str, key: bytes) -> list[Address]:
        """Where a record of a known key may be, one address for each secret, the current one first."""
        return [Address(_tenant_tag(secret, tenant), key) for secret in self._secrets]

    def new_refinement_address(self, tenant: str, embedding_key: bytes, mask_index: int) -> Address:
        """A fresh token for one mask's logits: a nonce and a MAC that binds it to tenant, embedding and mask token."""
        secret = self._secrets[0]
        nonce = entropy.token_bytes(KEY_BYTES - _MAC_BYTES - 1) + bytes([mask_index])
        return Address(
            _tenant_tag(secret, tenant), nonce + _refinement_mac(secret, tenant, embedding_key, nonce)[:_MAC_BYTES]
        )

    def refinement_address(self, tenant: str, embedding_key: bytes, token: bytes) -> Address | None:
        """Where a token's logits are, or None when it was not made for this tenant and embedding."""
        nonce, mac = token[:-_MAC_BYTES], token[-_MAC_BYTES:]
        for secret in self._secrets:
            if hmac.compare_digest(_refinement_mac(secret, tenant, embedding_key, nonce)[:_MAC_BYTES], mac):
                return Address(_tenant_tag(secret, tenant), token)
        return None


def _refinement_mac(secret: bytes, tenant: str, embedding_key: bytes, nonce: bytes) -> bytes:
    return _mac(secret, b"refinement", tenant.encode(), embedding_key, nonce)


@functools.lru_cache(maxsize=1024)
def _tenant_tag(secret: bytes, tenant: str) -> bytes:
    return _mac(secret, b"tenant", tenant.encode())[:TAG_BYTES]


def _mac(secret: bytes, *parts: bytes) -> bytes:
    """HMAC-SHA256 over the parts, each behind its length, so that no two lists of parts read the same."""
    message = b"".join(len(part).to_bytes(4, "big") + part for part in parts)
    return hmac.digest(secret, message, "sha256")
