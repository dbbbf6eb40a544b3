"""Environment variables of a rank's process."""

# A launcher sets these for its ranks. Remove them before starting another launcher, which must
# choose its own values: the previous run may still hold the old port.
RANK_VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "NODE_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
)
