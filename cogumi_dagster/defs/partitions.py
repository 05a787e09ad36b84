"""The partitions of the graph, and how modifiers draw on domains."""

import dagster as dg

from cogumi_dagster.lib.artifacts import ArtifactStore
from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.profile import DOMAINS, MODIFIERS, STRATEGIES, Profile, read_profile


def _strategies() -> list[str]:
    """Those that are written down, and what else the profile in force names; a broken profile is reported where it is
    used."""
    try:
        named = read_profile().strategy.families
    except CogumiError:
        named = ()
    return list(dict.fromkeys((*STRATEGIES, *named)))


domain_partitions = dg.StaticPartitionsDefinition(list(DOMAINS))
modifier_partitions = dg.StaticPartitionsDefinition(list(MODIFIERS))
strategy_partitions = dg.StaticPartitionsDefinition(_strategies())


def partitions_made(
    definition: dg.PartitionsDefinition | None,
    profile: Profile | None = None,
    store: ArtifactStore | None = None,
    asked: str | None = None,
) -> list[str | None]:
    """The partitions that a run makes: all; of the strategies those of the profile, those that were made before, and
    the one that is asked for."""
    if definition is None:
        return [None]
    keys: list[str | None] = list(definition.get_partition_keys())
    if definition == strategy_partitions and profile is not None:
        before = {key for key in keys if store and store.recorded("strategy_evaluation", key)}
        return [key for key in keys if key in (*profile.strategy.families, *before, asked)]
    return keys
