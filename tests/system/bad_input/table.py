"""The table: every bad input, how it is made, and what its error line must contain."""

from tests.system.bad_input import configuration, models, rows, surroundings

REFUSED = [
    *(rows.FILES + rows.NOTHING_LEFT + rows.KEYS),
    *(models.MODELS + models.ADAPTERS + models.TOKENIZERS + models.HUB),
    *(configuration.YAML + configuration.KEYS + configuration.VALUES),
    *(surroundings.FOLDERS + surroundings.COMMANDS + surroundings.NO_SPACE),
]
ENDED = surroundings.ENDED
ALLOWED = rows.ALLOWED + models.ALLOWED + surroundings.ALLOWED
CASES = REFUSED + ENDED + ALLOWED
