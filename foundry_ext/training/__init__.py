"""Everything that a YAML can name: the Composer model, optimizers, callbacks, loggers."""
