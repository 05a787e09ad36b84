"""The code location: assets, their resources, jobs, sensors and schedules, wired once."""

import dagster as dg

from cogumi_dagster.defs import automation, pipeline
from cogumi_dagster.defs.dataset.checks import CHECKS
from cogumi_dagster.defs.graph import ASSETS
from resources import build_resources

defs = dg.Definitions(
    assets=ASSETS,
    asset_checks=CHECKS,
    jobs=[*automation.JOBS, pipeline.full_pipeline_job],
    sensors=automation.SENSORS,
    schedules=automation.SCHEDULES,
    resources=build_resources(),
    executor=dg.multiprocess_executor.configured(
        {
            "max_concurrent": 2,
            "start_method": {"forkserver": {"preload_modules": ["cogumi_dagster.definitions"]}},
        }
    ),
)
