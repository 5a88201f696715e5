"""What a data owner or an operator asks of everything that leaves: the policy that outputs are filtered by."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Final

from prefect.blocks.core import Block
from pydantic import BaseModel, ConfigDict, Field

_SLUG: Final = "filter-policy"

Address = Annotated[str, Field(pattern=r"^0x[0-9a-fA-F]{40}$")]


class Decision(StrEnum):
    """What becomes of a stage's outputs. The later one is the stricter one."""

    PASS = "pass"  # noqa: S105 - no password
    HOLD = "hold"
    WITHHOLD = "withhold"


class Mode(StrEnum):
    """What a finding leads to. The later one is the stricter one."""

    REPORT = "report"
    HOLD = "hold"
    WITHHOLD = "withhold"


class Review(BaseModel):
    """Who decides on what is held."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    reviewers: tuple[Address, ...] = ()
    approvals: Annotated[int, Field(ge=1, le=2)] = 1
    """How many of them have to approve, each on their own."""


class FilterPolicy(Block):
    """One policy, saved as the block ``filter-policy/<id>``; environments and data sets name it by its id."""

    model_config = ConfigDict(hide_input_in_errors=True)

    _block_type_name = "Filter policy"
    _block_type_slug = _SLUG
    _description = "What may leave: checks of outputs and logs, and who reviews what is held."

    id: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,63}$")] = Field(description="The block's name.")
    mode: Mode = Field(default=Mode.WITHHOLD, description="What a finding leads to.")
    review: Review = Field(default=Review(), description="Who decides on what is held.")
