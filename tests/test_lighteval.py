"""Our judge of mathematics says what lighteval says, pair by pair (`benchmarks/lighteval_agreement.py`)."""

import json
import runpy
from pathlib import Path

from secateurs.questions.math_judge import MathJudge

VERSIONS, *PAIRS = map(json.loads, (Path(__file__).parent / "golden" / "lighteval.jsonl").read_text().splitlines())
DISAGREE = {
    ("25", r"\boxed{25\%}"): "lighteval reads the box as a quarter; here the sign is a unit, as math-verify 0.9 has it",
}


def test_the_verdicts_are_of_the_pairs_in_the_script():
    script = Path(__file__).parents[1] / "benchmarks" / "lighteval_agreement.py"
    assert [(pair["reference"], pair["reply"]) for pair in PAIRS] == runpy.run_path(str(script))["PAIRS"]


def test_verdicts_are_those_of_lighteval():
    assert VERSIONS["lighteval"] == "0.13.0"
    assert len(PAIRS) >= 120 and 80 < sum(pair["same"] for pair in PAIRS) < len(PAIRS) - 25
    judge = MathJudge()
    found = {(pair["reference"], pair["reply"]): judge.same(pair["reference"], pair["reply"]) for pair in PAIRS}
    assert len(found) == len(PAIRS) and judge.unjudged == 0
    different = {
        (pair["reference"], pair["reply"]) for pair in PAIRS if found[pair["reference"], pair["reply"]] != pair["same"]
    }
    assert different == set(DISAGREE)
