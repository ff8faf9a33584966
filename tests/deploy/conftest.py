"""Every test that takes `manifests` runs for every variant."""

import pytest
from manifests import VARIANTS, Manifest, build


@pytest.fixture(params=VARIANTS)
def manifests(request: pytest.FixtureRequest) -> tuple[Manifest, ...]:
    return build(request.param)
