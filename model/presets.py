"""Named sizes of the networks."""

from model.sam import SamConfig, sam_config

SAM_TINY: SamConfig = sam_config("sam_tiny")
