"""Keys and tokens: who can find a record, and who cannot."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitsam.common.keys import KEY_BYTES, TAG_BYTES, Address, EncodingVersion, KeyRing

OLD, NEW = b"the secret that is rotated out", b"the secret that replaces it"
VERSION = EncodingVersion(model_id="ab" * 32, preprocess_version="1", precision="fp32", codec="fp16")
DIGEST = bytes(range(32))


def key_of(tenant: str = "acme", digest: bytes = DIGEST, version: EncodingVersion = VERSION, secret: bytes = NEW):
    return KeyRing([secret]).embedding_addresses(tenant, digest, version)[0]


def test_the_same_image_of_the_same_tenant_has_the_same_address():
    assert key_of() == key_of()
    assert (len(key_of().key), len(key_of().tenant_tag)) == (KEY_BYTES, TAG_BYTES)


@pytest.mark.parametrize("field", ["model_id", "preprocess_version", "precision", "codec"])
def test_keys_differ_when_a_part_of_the_version_differs(field: str):
    changed = dataclasses.replace(VERSION, **{field: getattr(VERSION, field) + "x"})
    assert key_of(version=changed).key != key_of().key


def test_keys_differ_by_image_and_by_secret():
    assert len({key_of().key, key_of(digest=bytes(32)).key, key_of(secret=OLD).key}) == 3


def test_keys_differ_by_crop():
    crops = [None, (0, 0, 1, 1), (0, 0, 256, 1), (0, 0, 1, 256), (1, 0, 0, 1)]
    found = [KeyRing([NEW]).embedding_addresses("acme", DIGEST, VERSION, crop)[0] for crop in crops]
    assert len({address.key for address in found}) == len(crops)
    assert found[0] == key_of()


def test_keys_and_tags_differ_by_tenant():
    assert key_of("acme").key != key_of("globex").key
    assert key_of("acme").tenant_tag != key_of("globex").tenant_tag


def test_a_known_key_leads_another_tenant_elsewhere():
    ring = KeyRing([NEW])
    own = key_of("acme")
    assert ring.addresses("acme", own.key) == [own]
    foreign = ring.addresses("globex", own.key)[0]
    assert foreign.redis_name("embedding") != own.redis_name("embedding")


def test_redis_names_stay_what_they_are_over_releases():
    address = Address(bytes(TAG_BYTES), DIGEST)
    assert address.redis_name("embedding") == f"splitsam:embedding:{'00' * TAG_BYTES}:{DIGEST.hex()}"


def test_redis_names_differ_by_kind():
    assert key_of().redis_name("embedding") != key_of().redis_name("logits")


@settings(max_examples=200)
@given(st.tuples(*[st.text(max_size=4)] * 5), st.tuples(*[st.text(max_size=4)] * 5))
def test_no_two_lists_of_parts_collide(first: tuple[str, ...], second: tuple[str, ...]):
    keys = {parts: key_of(parts[0], version=EncodingVersion(*parts[1:])).key for parts in (first, second)}
    assert len(set(keys.values())) == len({first, second})


def test_bytes_moved_between_neighbouring_parts_change_the_key():
    joined = [("ab", "c"), ("a", "bc"), ("", "abc"), ("abc", "")]
    versions = [EncodingVersion(model, preprocess, "fp32", "fp16") for model, preprocess in joined]
    assert len({key_of(version=version).key for version in versions}) == len(joined)


def test_what_the_old_secret_stored_is_still_found_while_it_is_rotated():
    rotating = KeyRing([NEW, OLD])
    stored = key_of(secret=OLD)
    assert rotating.embedding_addresses("acme", DIGEST, VERSION) == [key_of(secret=NEW), stored]
    assert stored in rotating.addresses("acme", stored.key)
    assert stored not in KeyRing([NEW]).addresses("acme", stored.key)


@pytest.mark.parametrize("secrets", [[], [b"fifteen bytes.."], [NEW, b"short"]])
def test_a_ring_without_a_long_enough_secret_is_refused(secrets: list[bytes]):
    with pytest.raises(ValueError, match="at least 16 bytes"):
        KeyRing(secrets)


def refinement(mask_index: int = 2) -> Address:
    return KeyRing([NEW]).new_refinement_address("acme", DIGEST, mask_index)


def test_a_refinement_token_leads_back_to_its_address():
    address = refinement()
    assert len(address.key) == KEY_BYTES
    assert KeyRing([NEW]).refinement_address("acme", DIGEST, address.key) == address


def test_refinement_tokens_of_the_same_mask_differ():
    assert refinement().key != refinement().key


def test_a_refinement_token_is_refused_for_another_tenant_embedding_or_secret():
    token = refinement().key
    assert KeyRing([NEW]).refinement_address("globex", DIGEST, token) is None
    assert KeyRing([NEW]).refinement_address("acme", bytes(32), token) is None
    assert KeyRing([OLD]).refinement_address("acme", DIGEST, token) is None


def test_a_refinement_token_survives_a_rotation():
    address = KeyRing([OLD]).new_refinement_address("acme", DIGEST, 0)
    assert KeyRing([NEW, OLD]).refinement_address("acme", DIGEST, address.key) == address


def test_a_refinement_token_with_any_bit_flipped_is_refused():
    ring, token = KeyRing([NEW]), refinement().key
    for bit in range(8 * len(token)):
        flipped = bytearray(token)
        flipped[bit // 8] ^= 1 << bit % 8
        assert ring.refinement_address("acme", DIGEST, bytes(flipped)) is None


@given(st.binary(max_size=64))
def test_bytes_that_are_no_token_are_refused(token: bytes):
    assert KeyRing([NEW]).refinement_address("acme", DIGEST, token) is None
