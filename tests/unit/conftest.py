# SPDX-License-Identifier: Apache-2.0
"""What several unit tests build."""

from __future__ import annotations

import pytest
from fakes import Build, builder


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    return builder(tmp_path_factory.mktemp("fakes"))
