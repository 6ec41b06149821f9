"""What an allocator or a cut wants to know of the dense model: outliers, and what each part does for it."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float32
from torch import Tensor, nn
from transformers import PreTrainedModel

from secateurs.allocators import MOST, Layer
from secateurs.calibration import Batch, CalibrationSet, Document, batches, worth
from secateurs.collect import (
    Group,
    Held,
    Inputs,
    Opened,
    Shell,
    Stream,
    added,
    capture,
    collect,
    inputs_of,
    pools_of,
    same_groups,
    swapped,
)
from secateurs.cuts import Depth
from secateurs.layer import Gram, LayerProblem, relative_error
from secateurs.models import Matrix, decoder_blocks
from secateurs.patterns import Columns, Unstructured
from secateurs.ranks import ALONE, Ranks
from secateurs.scores import wanda
from secateurs.solvers.admm import ADMM

STEP = 0.05
REACH = 3  # steps of the curve below and above the sparsity that is wanted
OUTLYING = 5.0  # times the mean: M in OWL
PROBE_TOKENS = 2000
PROBE_BATCH = 1024
DROP_TOKENS = 1000
LOSS_TOKENS = 20_000
RANK_FROM = 1e-7  # of the largest eigenvalue


@dataclass(frozen=True)
class _Found:
    """A matrix, its curve of relative errors, its output energy, and its weights at the middle of the curve."""

    matrix: Matrix
    unit: str
    errors: tuple[tuple[float, float], ...]
    energy: float
    pruned: Tensor | None

    @property
    def facts(self) -> tuple[str, tuple[str, tuple[tuple[float, float], ...], float]]:
        """What all processes are told."""
        return self.matrix.name, (self.unit, self.errors, self.energy)


@torch.no_grad()
def survey(
    model: PreTrainedModel,
    calibration: CalibrationSet,
    selected: Sequence[Sequence[Matrix]],
    sparsity: float,
    *,
    curves: bool,
    opened: Opened = nullcontext,
    batch_tokens: int = 2048,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
    ranks: Ranks = ALONE,
) -> list[Layer]:
    """One `Layer` for each of the `selected` matrices of every block. The model is as it was afterwards.

    With `curves`: a path of solves from `sparsity` + .15 to `sparsity` - .15 gives every matrix's held-out error on the
    dense model's activations, e(s). Then it alone is pruned, at about `sparsity`, and KL(dense, pruned) of the next
    token is measured on the first 2,000 held-out tokens; the curve is KL e(s) / e(sparsity). Experts of a block are
    pruned together and share their KL by the output energy they lose.
    A block's weights need to be there while `opened(index)` is; with `curves`, all of them and always.
    Cost: about three solves, and a forward pass of the probe, for every matrix; memory: the weights once more.
    All `ranks` call this together and share tokens, solves and what is pruned alone.
    """
    total = sum(map(len, selected)) * (2 if curves else 1)
    _, blocks = decoder_blocks(model)
    streams = capture(model, calibration, batch_tokens, ranks=ranks)
    here: list[_Found] = []
    order: list[str] = []
    outliers: list[float] = []
    for index, (block, matrices) in enumerate(zip(blocks, selected, strict=True)):
        with opened(index):
            groups = same_groups(block, index, matrices, streams, ranks)
            sums = collect(block, index, groups, streams, calibration.weights, move=True)
            pools, mine = pools_of(groups, sums, ranks), list[tuple[Group, Inputs, Held | Gram]]()
            for group, taker in zip(groups, _takers(groups, index, ranks), strict=True):
                inputs = inputs_of(group, sums, pools, ranks=ranks, to=taker)
                held: Held | Gram = sums.held[group.name]  # of one process a Gram not before it is needed
                if curves and ranks.count > 1:
                    held = added(held.gram(inputs.gram), ranks, taker)
                if taker == ranks.index:
                    mine.append((group, inputs, held))
            found, scores = ranks.together(partial(_solved, mine, sparsity, curves, len(order), total, progress))
            here += found
            outliers.append(_outliers(scores, ranks))
        order += [matrix.name for group in groups for matrix in group.matrices]
    losses: dict[str, float] = {}
    if curves:
        losses = ranks.together(lambda: _sensitivities(model, here, calibration.held_out, progress, total))
    losses = {unit: loss for each in ranks.gather(losses) for unit, loss in each.items()}
    curve_of = {name: facts for each in ranks.gather([one.facts for one in here]) for name, facts in each}
    lost: dict[str, float] = {}
    for unit, errors, energy in curve_of.values() if curves else ():
        lost[unit] = lost.get(unit, 0.0) + energy * _middle(errors, sparsity)
    place = {matrix.name: (index, matrix) for index, matrices in enumerate(selected) for matrix in matrices}
    layers = []
    for name in order:
        (unit, errors, energy), (index, matrix) = curve_of[name], place[name]
        scale = losses[unit] * energy / lost[unit] if lost.get(unit) else 0.0
        curve = tuple((s, scale * error) for s, error in errors)
        layers.append(Layer(name=name, block=index, size=matrix.weight.numel(), outliers=outliers[index], curve=curve))
    return layers


def _solved(
    mine: Sequence[tuple[Group, Inputs, Held | Gram]],
    sparsity: float,
    curves: bool,
    before: int,
    total: int,
    progress: Callable[[int, int, str], None],
) -> tuple[list[_Found], list[Tensor]]:
    """What is found of this process's groups, and the Wanda scores of their matrices."""
    found, scores = list[_Found](), list[Tensor]()
    for group, inputs, held in mine:
        gram = inputs.of_some_tokens(group)
        judge = gram
        if curves:
            judged = held.gram(gram) if isinstance(held, Held) else held
            judge = judged if judged.tokens else gram
        for matrix in group.matrices:
            scores.append(wanda(matrix.weight, gram).flatten() / gram.weight_sum**0.5)
            found.append(_curve(matrix, group, gram, judge, sparsity, curves))
            progress(before + len(found), total, matrix.name)
    return found, scores


def _takers(groups: Sequence[Group], index: int, ranks: Ranks) -> list[int]:
    """Which process solves each group of a block: the groups of a unit are in one; every block starts with another."""
    units = [_unit(group, group.matrices[0]) for group in groups]
    costs = dict.fromkeys(units, 0.0)
    for unit, group in zip(units, groups, strict=True):
        costs[unit] += group.cost
    takers = dict(zip(costs, ranks.shares(list(costs.values())), strict=True))
    return [(takers[unit] + index) % ranks.count for unit in units]


def _unit(group: Group, matrix: Matrix) -> str:
    """What is pruned together to see what it does for the model: a matrix, or what all experts do with one input."""
    return matrix.name if group.expert is None else f"{matrix.name.rsplit('.', 2)[0]}: {group.part}"


def _outliers(scores: Sequence[Tensor], ranks: Ranks) -> float:
    """The share of a block's Wanda scores above five times their mean; inputs per token, so that experts compare."""
    size = torch.zeros(2, dtype=torch.float64)  # sum and count
    for one in scores:
        size += torch.tensor([float(one.sum(dtype=torch.float64)), one.numel()])
    ranks.add(size)
    mean, count = float(size[0]) / max(float(size[1]), 1.0), max(float(size[1]), 1.0)
    above = torch.tensor(float(sum(int((one > OUTLYING * mean).sum()) for one in scores)), dtype=torch.float64)
    ranks.add(above)
    return float(above) / count


def _curve(matrix: Matrix, group: Group, gram: Gram, held: Gram, sparsity: float, curves: bool) -> _Found:
    unit = _unit(group, matrix)
    if not curves:
        return _Found(matrix, unit, (), 0.0, None)
    dense = matrix.weight.clone()
    grid = [round(sparsity + STEP * step, 6) for step in range(REACH, -REACH - 1, -1)]
    grid = [point for point in grid if 0 < point < MOST]
    patterns = [Unstructured(point, "layer") for point in grid]
    problem = LayerProblem(name=matrix.name, weight=dense, gram=gram, pattern=patterns[0])
    errors, pruned = [], None
    for point, solution in zip(grid, ADMM().path(problem, patterns), strict=True):
        errors.append((point, relative_error(solution.weight, dense, held)))
        if abs(point - sparsity) < STEP / 2:
            pruned = solution.weight
    weight = dense.float()
    return _Found(matrix, unit, tuple(reversed(errors)), float(((weight @ held.xtx) * weight).sum()), pruned)


def _middle(errors: Sequence[tuple[float, float]], sparsity: float) -> float:
    """The error at the sparsity that the matrix was pruned to for its sensitivity."""
    return min(errors, key=lambda point: abs(point[0] - sparsity))[1]


def _sensitivities(
    model: PreTrainedModel,
    found: Sequence[_Found],
    held_out: Sequence[Document],
    progress: Callable[[int, int, str], None],
    total: int,
) -> dict[str, float]:
    """KL(dense, pruned) in nats a token for every unit pruned alone. ValueError without held-out documents."""
    probe: list[Document] = []
    for document in held_out:
        if sum(len(one.ids) for one in probe) < PROBE_TOKENS:
            probe.append(document)
    if not probe:
        raise ValueError("curves are measured on held-out documents, and there are none: raise held_out_tokens")
    dense = [(batch, _log_probabilities(model, batch)) for batch in batches(probe, PROBE_BATCH)]
    units: dict[str, list[_Found]] = {}
    for one in found:
        units.setdefault(one.unit, []).append(one)
    losses, done = {}, 0
    for unit, members in units.items():
        with swapped({one.matrix: one.pruned for one in members if one.pruned is not None}):
            divergence = tokens = 0.0
            for batch, before in dense:
                kl = nn.functional.kl_div(_log_probabilities(model, batch), before, reduction="sum", log_target=True)
                divergence, tokens = divergence + float(kl), tokens + len(before)
        losses[unit] = max(divergence / tokens, 0.0)
        done += len(members)
        progress((total + total * done // len(found)) // 2, total, members[0].matrix.name)
    return losses


def _log_probabilities(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Of the next token after every real token of a batch [tokens, vocabulary], float32."""
    logits = model(input_ids=batch.ids.to(model.device), use_cache=False).logits
    return logits[batch.regions.to(logits.device) > 0].float().log_softmax(-1)


@torch.no_grad()
def blocks_to_drop(
    model: PreTrainedModel,
    calibration: CalibrationSet,
    cut: Depth,
    *,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
    ranks: Ranks = ALONE,
) -> list[int]:
    """Which blocks a model misses least on the calibration documents, in order of their place.

    With "drop", one goes after the other: whichever leaves the final hidden states (after the last norm) nearest to the
    dense model's, over the first 1,000 tokens that count. With "angle", those that turn the residual stream least.
    Cost: a forward pass of the probe and, for "drop", half of one for every block that is left, as often as one goes,
    which all `ranks` share.
    """
    _, blocks = decoder_blocks(model)
    count, probe = cut.count(len(blocks)), _probe(calibration)
    shell = Shell(model)
    streams = [Stream(batch, False, shell, shell.enter(batch)) for batch in probe]
    entering: list[list[Tensor]] = []  # of every block: the residual stream of every batch before it
    turned = []
    for index, block in enumerate(blocks):
        entering.append([stream.hidden for stream in streams])
        for stream in streams:
            stream.hidden = stream.run(block, index)
        turned.append(_turned(entering[-1], streams))
    if cut.score == "angle":
        return sorted(sorted(range(len(blocks)), key=lambda index: turned[index])[:count])
    aims = [shell.leave(stream.batch, stream.hidden) for stream in streams]
    left = list(range(len(blocks)))
    total, done = sum(len(blocks) - gone for gone in range(count)), 0
    for _ in range(count):
        lost = {}
        for place, candidate in enumerate(left):
            if place % ranks.count == ranks.index:
                lost[candidate] = _lost_without(blocks, left[place + 1 :], entering[candidate], streams, aims)
            progress(done := done + 1, total, f"block {candidate}")
        lost = {index: loss for each in ranks.gather(lost) for index, loss in each.items()}
        gone = min(left, key=lambda index: lost[index])
        place = left.index(gone)
        left.remove(gone)
        for stream, hidden in zip(streams, entering[gone], strict=True):
            stream.hidden = hidden
        for index in left[place:]:  # what the blocks after it now receive
            entering[index] = [stream.hidden for stream in streams]
            for stream in streams:
                stream.hidden = stream.run(blocks[index], index)
    return sorted(set(range(len(blocks))) - set(left))


def loss_roots(
    model: PreTrainedModel,
    calibration: CalibrationSet,
    columns: Mapping[str, Columns],
    *,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
    ranks: Ranks = ALONE,
) -> dict[str, Tensor]:
    """R [rank, d_out] of the linears named in `columns`: an error e of an output costs about |R e|^2 / 2 nats a token.

    R^T R is the mean over tokens of g g^T, where g is the gradient of what the tokens that count surprise the model by
    with respect to the output: the factor for outputs of the Fisher information as K-FAC splits it (Martens & Grosse
    2015, arXiv 1503.05671), taken at the documents' own next tokens. Over the first 20,000 tokens that count.
    Cost: three forward passes of them; memory: the whole model, the activations and logits of the longest document, and
    a float32 d_out x d_out sum for every linear. All `ranks` share the tokens; the first one is given what they say.
    """
    linears: dict[str, Any] = {name: model.get_submodule(name) for name in columns}
    grams = {name: Gram.zeros(linear.out_features, model.device) for name, linear in linears.items()}

    def watch(name: str, x: Tensor | None, gradient: Tensor) -> None:
        grams[name].update(gradient)

    _gradients(model, calibration, list(columns), watch, progress, ranks)
    grams = {name: added(gram, ranks, 0) for name, gram in grams.items()}
    return {name: _root(gram) for name, gram in grams.items()} if ranks.first else {}


def taylor_costs(
    model: PreTrainedModel,
    calibration: CalibrationSet,
    columns: Mapping[str, Columns],
    *,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
    ranks: Ranks = ALONE,
) -> dict[str, Tensor]:
    """What each group of inputs of some linears does for the model, to first order: float32 [groups] by name.

    The mean over tokens of (sum over the group of x_j dL/dx_j)^2, with L as in `loss_roots`: how much it would change
    without the group at that token (Molchanov et al. 2019, arXiv 1906.10771, eq. 8, for inputs instead of weights).
    Unlike `loss_roots`, nothing is known of how other inputs would make up for it. Cost and memory are as there, but
    the inputs of the linears on all tokens of a batch instead of the sums. All `ranks` share the tokens.
    """
    linears: dict[str, Any] = {name: model.get_submodule(name) for name in columns}
    sums = {name: torch.zeros(linear.in_features // columns[name].size + 1) for name, linear in linears.items()}

    def watch(name: str, x: Tensor | None, gradient: Tensor) -> None:
        assert x is not None
        effects = x.float() * (gradient.float() @ linears[name].weight.float())
        of_groups = effects.view(len(x), -1, columns[name].size).sum(-1).square()
        sums[name][:-1] += of_groups.sum(0).cpu()
        sums[name][-1] += len(x)

    _gradients(model, calibration, list(columns), watch, progress, ranks, inputs=True)
    for found in sums.values():
        ranks.add(found)
    return {name: found[:-1] / found[-1] for name, found in sums.items()}


# What is known of the model before a width is cut, by `Width.score`; the field of a `Plan` that it goes to.
BY_GRADIENTS = {"loss": ("loss_roots", loss_roots), "taylor": ("costs", taylor_costs)}


def _gradients(
    model: PreTrainedModel,
    calibration: CalibrationSet,
    names: Sequence[str],
    watch: Callable[[str, Tensor | None, Tensor], None],
    progress: Callable[[int, int, str], None],
    ranks: Ranks,
    *,
    inputs: bool = False,
) -> None:
    """Show the `inputs` of some linears [tokens, d_in] (else None), and the gradients of the loss with respect to their
    outputs [tokens, d_out], to `watch`: this process's batches, real tokens only."""
    probe = _probe(calibration, LOSS_TOKENS)[ranks.index :: ranks.count]
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, out: Tensor) -> None:
            x = args[0].detach() if inputs else None  # which nothing else keeps
            out.register_hook(lambda gradient: watch(name, None if x is None else x[real], gradient[real]))

        return hook

    with ExitStack() as stack, torch.enable_grad():
        for parameter in learning:
            stack.callback(parameter.requires_grad_, True)
            parameter.requires_grad_(False)
        embeddings: Any = model.get_input_embeddings()
        stack.callback(embeddings.register_forward_hook(lambda module, args, out: out.requires_grad_()).remove)
        for name in names:
            stack.callback(model.get_submodule(name).register_forward_hook(note(name)).remove)
        for done, batch in enumerate(probe, start=1):
            ids, regions = batch.ids.to(model.device), batch.regions.to(model.device)
            counts, real = worth(regions, calibration.weights), regions > 0
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            surprise = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
            (surprise * counts[:, 1:].flatten()).sum().backward()
            progress(done, len(probe), "gradients")


def _root(gram: Gram) -> Float32[Tensor, "rank d"]:
    """R with R^T R = the mean over tokens, without what is nothing."""
    values, vectors = torch.linalg.eigh(gram.xtx.double() / gram.tokens)
    there = values > RANK_FROM * values[-1].clamp(min=1e-300)
    return (vectors[:, there] * values[there].sqrt()).T.float().contiguous()


def _probe(calibration: CalibrationSet, tokens: int = DROP_TOKENS) -> list[Batch]:
    """The first documents that calibrate, as few as have so many tokens with a weight."""
    some: list[Document] = []
    for document in calibration.documents:
        some.append(document)
        if sum(one.count(calibration.weights) for one in some) >= tokens:
            break
    return list(batches(some, PROBE_BATCH))


def _turned(before: Sequence[Tensor], streams: Sequence[Stream]) -> float:
    """1 - the mean cosine between the residual stream before a block and after it, over real tokens."""
    cosines = []
    for hidden, stream in zip(before, streams, strict=True):
        real = stream.batch.regions.to(hidden.device) > 0
        cosines.append(torch.cosine_similarity(hidden[real].float(), stream.hidden[real].float(), dim=-1))
    return 1 - float(torch.cat(cosines).mean())


def _lost_without(
    blocks: Sequence[nn.Module],
    after: Sequence[int],
    entering: Sequence[Tensor],
    streams: Sequence[Stream],
    aims: Sequence[Tensor],
) -> float:
    """How far the final hidden states are from the dense model's when what enters a block goes on to those after it."""
    lost = size = 0.0
    for hidden, stream, aim in zip(entering, streams, aims, strict=True):
        for index in after:
            hidden = stream.run(blocks[index], index, hidden)
        final = stream.shell.leave(stream.batch, hidden)
        real = stream.batch.regions.to(hidden.device) > 0
        lost += float((final - aim)[real].float().square().sum())
        size += float(aim[real].float().square().sum())
    return lost / size
