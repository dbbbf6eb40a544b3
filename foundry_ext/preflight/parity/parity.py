"""The comparison of a pair of models in every dtype, with every attention backend."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from foundry_ext.models.attention import BACKENDS, resolve_backend
from foundry_ext.models.flex import LEAST_HEAD
from foundry_ext.preflight.parity.activations import (
    EMBEDDING,
    WHOLE,
    Activations,
    Documents,
    Inputs,
    Site,
    layer_row,
    parts_of_ours,
    parts_of_theirs,
    rows,
    whole_of_ours,
    whole_of_theirs,
)
from foundry_ext.preflight.parity.differences import (
    Column,
    Difference,
    Parity,
    difference,
    sites_of,
)
from foundry_ext.preflight.parity.models import Pair, in_dtype, in_wider_dtype
from foundry_ext.utils.errors import UserError
from foundry_ext.utils.progress import progress

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LEAST_TOKENS = 8
_SEED = 17


def check_arguments(backends: Sequence[str] | None, num_tokens: int) -> Sequence[str]:
    """Return the backends to compare, all if None, after checking both arguments.

    Raises:
        UserError: a backend is unknown, or there are too few tokens.
    """
    known = BACKENDS[1:]  # without "auto", which stands for one of them
    for name in backends or ():
        if name not in known:
            raise UserError(f"--backends: {name!r} is unknown; choose from {', '.join(known)}")
    if num_tokens < LEAST_TOKENS:
        raise UserError(f"--tokens: {num_tokens}; give at least {LEAST_TOKENS}")
    return known if backends is None else tuple(dict.fromkeys(backends))


def compare(
    pair: Pair,
    *,
    model: str,
    dtypes: Sequence[str],
    backends: Sequence[str],
    num_tokens: int,
) -> Parity:
    """Compare a pair, on a GPU if there is one.

    Args:
        pair: both models in fp32, on the CPU.
        model: its name, for the result.
        dtypes: keys of `DTYPES`.
        backends: attention backends; those that cannot run here are skipped with the reason.
        num_tokens: tokens in three documents, one of which has a single token.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = pair.ours.config
    documents = _random_documents(config.vocab_size, num_tokens, device)
    parity = Parity(model, device, documents.lengths, rows(config.num_hidden_layers))
    columns = _columns(pair, dtypes, backends, documents, device)
    total = len(dtypes) * len(backends)
    for column in progress(columns, "parity", total=total, unit="columns"):
        if isinstance(column, Column):
            parity.columns.append(column)
        else:
            dtype, backend, reason = column
            parity.skipped[dtype, backend] = reason
    return parity


def _random_documents(vocabulary: int, num_tokens: int, device: str) -> Documents:
    generator = torch.Generator().manual_seed(_SEED)
    ids = torch.randint(0, vocabulary, (num_tokens,), generator=generator).to(device)
    half = num_tokens // 2
    return Documents(ids, (half, 1, num_tokens - half - 1))


def _columns(
    pair: Pair, dtypes: Sequence[str], backends: Sequence[str], documents: Documents, device: str
) -> Iterator[Column | tuple[str, str, str]]:
    """Yield a column, or (dtype, backend, why it is skipped), for each dtype and backend."""
    for name in dtypes:
        reasons = {
            backend: _why_not(backend, device, DTYPES[name], pair.ours.config.head_dim)
            for backend in backends
        }
        theirs = None
        for backend, reason in reasons.items():
            if not reason:
                if theirs is None:
                    theirs = _Theirs.run(pair, DTYPES[name], documents, device)
                reason = theirs.overflow
            if reason or theirs is None:
                yield name, backend, reason
            else:
                yield Column(name, backend, theirs.differences(backend))


def _why_not(backend: str, device: str, dtype: torch.dtype, head_dim: int) -> str:
    """Return why a backend cannot run here; "" if it can."""
    try:
        resolve_backend(
            backend, device=device, dtype=dtype, narrow_heads=bool(head_dim < LEAST_HEAD)
        )
    except UserError as error:
        return str(error).removeprefix(f"attention_backend: {backend!r} ")
    return ""


@dataclass(frozen=True)
class _Theirs:
    """Everything that the columns of one dtype share: all but ours."""

    pair: Pair
    documents: Documents
    inputs: Inputs
    exact: Activations
    rounded: Activations

    @classmethod
    def run(cls, pair: Pair, dtype: torch.dtype, documents: Documents, device: str) -> "_Theirs":
        pair = in_dtype(pair, dtype, device)
        model = in_wider_dtype(pair.theirs)
        whole = whole_of_theirs(model, documents)
        num_layers = len(model.model.layers)
        streams = [Site(EMBEDDING, WHOLE), *(Site(layer_row(i), WHOLE) for i in range(num_layers))]
        generator = torch.Generator().manual_seed(_SEED)
        shape = (len(documents.input_ids), pair.ours.config.hidden_size)
        cotangent = torch.randn(shape, generator=generator).to(device, dtype)
        inputs = Inputs([whole[site].to(dtype) for site in streams], cotangent)
        exact = whole | parts_of_theirs(model, documents, inputs)
        del model  # the largest copy of the weights
        rounded = whole_of_theirs(pair.theirs, documents)
        rounded |= parts_of_theirs(pair.theirs, documents, inputs)
        return cls(pair, documents, inputs, exact, rounded)

    @property
    def overflow(self) -> str:
        """Return where transformers' own numbers are not finite; "" if they all are."""
        for site, x in self.rounded.items():
            if not x.isfinite().all():
                return f"transformers' own {site.row} is not finite, so there is no bound"
        return ""

    def differences(self, backend: str) -> dict[Site, Difference]:
        dtype, device = self.pair.ours.dtype, self.documents.input_ids.device.type
        # Without a GPU only some versions of torch have flex's backward pass.
        gradients = not (backend == "flex" and device == "cpu")
        options = {"backend": backend, "gradients": gradients}
        ours = whole_of_ours(self.pair.ours, self.documents, **options)
        ours |= parts_of_ours(self.pair.ours, self.documents, self.inputs, **options)
        return {
            site: difference(site, ours[site], self.rounded[site], self.exact[site], dtype)
            for site in sites_of(rows(len(self.pair.ours.model.layers)))
            if site in ours
        }
