"""What a launcher sets for its ranks."""

# What a launcher sets for its ranks. A launcher started below it picks values of its own, its port
# above all: the run before may still hold the old one.
RANK_VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "NODE_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
)
