"""The partitions of the graph, and how modifiers draw on domains."""

import dagster as dg

from cogumi_dagster.lib.profile import DOMAINS, MODIFIERS, STRATEGIES

domain_partitions = dg.StaticPartitionsDefinition(list(DOMAINS))
modifier_partitions = dg.StaticPartitionsDefinition(list(MODIFIERS))
strategy_partitions = dg.StaticPartitionsDefinition(list(STRATEGIES))
