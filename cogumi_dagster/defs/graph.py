"""All assets, group by group, in the order in which data flows."""

from collections.abc import Sequence
from typing import Any

from cogumi_dagster.defs.base.assets import ASSETS as BASE
from cogumi_dagster.defs.compression.assets import ASSETS as COMPRESSION
from cogumi_dagster.defs.dataset.assets import ASSETS as DATASET
from cogumi_dagster.defs.deployment.assets import ASSETS as DEPLOYMENT
from cogumi_dagster.defs.modifiers.assets import ASSETS as MODIFIERS
from cogumi_dagster.defs.routing.assets import ASSETS as ROUTING
from cogumi_dagster.defs.strategy.assets import ASSETS as STRATEGY

GROUPS: dict[str, Sequence[Any]] = {
    "dataset": DATASET,
    "base": BASE,
    "compression": COMPRESSION,
    "modifiers": MODIFIERS,
    "strategy": STRATEGY,
    "routing": ROUTING,
    "deployment": DEPLOYMENT,
}

ASSETS = [asset for assets in GROUPS.values() for asset in assets]
