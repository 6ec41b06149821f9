"""What a run will do and take, without doing it."""

import time
from dataclasses import asdict
from itertools import islice
from typing import Any

import torch

from secateurs import evaluate, pruner
from secateurs.ask import evaluation_questions
from secateurs.calibration import batches, plain_document, region_weights
from secateurs.cell import hidden_states, memory_needs, plan_of
from secateurs.corpus import corpus_documents
from secateurs.dense import Dense
from secateurs.engines import Request, Sampling
from secateurs.engines.hf import hf_engine
from secateurs.experts import ExpertScore
from secateurs.layer import Gram, LayerProblem
from secateurs.narrow import Narrowing
from secateurs.planner import available
from secateurs.prompts import render
from secateurs.recipe import Recipe, arm_label, build_pattern, build_questions, build_solver


def plan_check(recipe: Recipe, dense: Dense) -> dict[str, Any]:
    """What a run will do, without doing it: sizes, tokens, memory. ValueError for what cannot work."""
    counts: dict[str, Any] = {}
    sizes: dict[str, int] = {}
    for cell in recipe.grid:
        plan = plan_of(cell, dense)
        matrices = [matrix for block in pruner.prunable(dense.checkpoint.model, plan) for matrix in block]
        sizes |= {matrix.name: matrix.weight.numel() for matrix in matrices}
        zeros = sum(plan.pattern_of(matrix).num_zeros(*matrix.weight.shape) for matrix in matrices)
        counts[str(build_pattern(cell.prune.pattern))] = zeros
    for cell in {arm_label(cell.calibration.arm): cell for cell in recipe.grid}.values():
        if region_weights(cell.calibration.arm).get("corpus"):
            corpus_documents(cell, recipe.seeds[0], dense.tokenizer)  # what is wrong is said before sampling
    evaluation_questions(recipe, recipe.seeds[0])  # as here
    models = len(recipe.grid)
    model = dense.checkpoint.model
    parameters = model.num_parameters()
    held_out = recipe.calibration.held_out_tokens
    tokens = recipe.calibration.num_tokens + held_out
    longest = recipe.calibration.first_tokens or recipe.traces.sampling.max_new_tokens
    memory = (memory_needs(cell, dense, tokens, held_out, longest) for cell in recipe.grid)
    wanted = max(memory, key=lambda one: one.on_device)
    traced = any(w.get("think") or w.get("answer") for w in map(region_weights, recipe.arms))
    return {
        "model": recipe.model,
        "parameters": parameters,
        "prunable_parameters": sum(sizes.values()),
        "matrices": len(sizes),
        "zeros": counts,
        "cells": len(recipe.seeds) * models,
        "trace_tokens_per_seed": tokens if traced else recipe.calibration.held_out_tokens,
        "answers": recipe.evaluate.num_questions * recipe.evaluate.samples
        * len(recipe.seeds) * (1 + models),
        "computes_in": str(dense.checkpoint.dtype).removeprefix("torch."),
        "memory_bytes": asdict(wanted) | {"on_device": wanted.on_device, "free": available(dense.checkpoint.device)},
        "processes": dense.ranks.sharing(dense.checkpoint.device),
        "hidden_states": hidden_states(recipe, dense, wanted),
    }  # fmt: skip


def estimate(recipe: Recipe, dense: Dense, plan: dict[str, Any]) -> dict[str, float]:
    """Seconds a run will take, by stage, from short probes here: a batch of short replies, a forward pass and a
    solve with each solver. Assumes that replies are half as long as they may be; rambling takes up to twice as long.
    Nothing where the whole model has no room."""
    if plan["parameters"] * dense.checkpoint.dtype.itemsize > available(dense.checkpoint.device):
        return {}
    questions = build_questions(recipe.traces.questions)
    size = recipe.resources.batch_size
    asked = list(islice(questions.questions("calibration", recipe.seeds[0]), size))
    prompts = [render(dense.tokenizer, questions.format, question) for question in asked]
    requests = [Request(question_id=str(i), sample=0, prompt_ids=ids, seed=i) for i, ids in enumerate(prompts)]
    sampling = Sampling(max_new_tokens=16)
    made = list(hf_engine(dense.model, dense.tokenizer, size).generate(requests, sampling))
    per_token = sum(completion.seconds for completion in made) / sum(len(completion.ids) for completion in made)
    batch = next(batches([plain_document(ids, "prompt") for ids in prompts], recipe.calibration.batch_tokens))
    clock = time.perf_counter()
    evaluate.reference_states(dense.checkpoint.model, [batch], dense.checkpoint.opened)
    forward = (time.perf_counter() - clock) / batch.tokens
    solve = 0.0
    cells = {repr(cell.prune.solver): cell for cell in recipe.grid}.values()
    for cell in cells:
        if isinstance(build_solver(cell.prune.solver), (ExpertScore, Narrowing)):
            continue
        how = plan_of(cell, dense)
        matrices = [matrix for block in pruner.prunable(dense.model, how) for matrix in block]
        pruned = [one for one in matrices if how.pattern_of(one).num_zeros(*one.weight.shape)] or matrices
        median = sorted(pruned, key=lambda matrix: matrix.weight.numel())[len(pruned) // 2]
        gram = Gram(torch.eye(median.weight.shape[1], device=median.weight.device), 1e6, 10**6)
        problem = LayerProblem(name="probe", weight=median.weight, gram=gram, pattern=how.pattern_of(median))
        clock = time.perf_counter()
        how.solver.solve(problem)
        solve += (time.perf_counter() - clock) * len(matrices) / len(cells)
    tokens = recipe.calibration.num_tokens + recipe.calibration.held_out_tokens
    length = (recipe.evaluate.sampling or recipe.traces.sampling).max_new_tokens / 2
    return {
        "trace": plan["trace_tokens_per_seed"] * len(recipe.seeds) * per_token,
        "prune": plan["cells"] * (3 * tokens * forward + solve),
        "evaluate": plan["answers"] * length * per_token,
    }
