"""What lighteval's extractive match says of the pairs below, for `tests/test_lighteval.py` to compare our judge with.

    python3.11 -m venv /tmp/lighteval && /tmp/lighteval/bin/pip install 'lighteval[math]==0.13.0'
    /tmp/lighteval/bin/python benchmarks/lighteval_agreement.py > tests/golden/lighteval.jsonl

The references are from MATH-500 and GSM8K; the replies are written as reasoning models end theirs. The metric is the
one of lighteval's `g_pass_at_k_latex`: a reference in LaTeX, a reply whose boxes come first.
"""

import json
from importlib.metadata import version

PAIRS: list[tuple[str, str]] = [
    # fractions and decimals
    (r"\frac{1}{2}", r"Therefore the probability is $\boxed{\frac{1}{2}}$."),
    (r"\frac{1}{2}", r"\boxed{0.5}"),
    (r"\frac{1}{2}", r"\boxed{\dfrac{2}{4}}"),
    (r"\frac{1}{2}", r"\boxed{1/2}"),
    (r"\frac{1}{2}", r"\boxed{2}"),
    (r"\frac{1}{2}", r"The final answer is $\frac{1}{2}$."),
    (r"\frac{1}{2}", "So the answer is 1/2."),
    (r"\frac{1}{2}", "So the answer is 0.5."),
    (r"\frac34", r"\boxed{\frac{3}{4}}"),
    (r"\frac34", r"\boxed{0.75}"),
    (r"\frac{2}{3}", r"\boxed{0.667}"),
    (r"\frac{2}{3}", r"\boxed{0.666667}"),
    (r"-\frac{24}{25}", r"Since $\theta$ is in the second quadrant, $\sin 2\theta = \boxed{-\frac{24}{25}}$."),
    (r"-\frac{24}{25}", r"\boxed{\frac{-24}{25}}"),
    (r"-\frac{24}{25}", r"\boxed{\frac{24}{25}}"),
    (r"1\frac{4}{5}", r"\boxed{1\frac{4}{5}}"),
    (r"1\frac{4}{5}", r"\boxed{\frac{9}{5}}"),
    (r"137 \frac{1}{2}", r"\boxed{137.5}"),
    (r".35625", r"\boxed{0.35625}"),
    (r"\frac{448}{15625}", r"\boxed{\frac{448}{15625}}"),
    # whole numbers, as GSM8K has them
    ("18", r"She makes 9 * 2 = $<<9*2=18>>18 every day. \boxed{18}"),
    ("18", r"\boxed{18.00}"),
    ("18", r"\boxed{\$18}"),
    ("18", r"\boxed{18 \text{ dollars}}"),
    ("18", r"**Final answer:** $\boxed{18}$ dollars"),
    ("18", "The answer is 18."),
    ("18", "The answer is $18."),
    ("18", "Answer: 18"),
    ("18", "#### 18"),
    ("18", "Janet has 16 eggs, eats 3, bakes with 4, and sells 9 at 2 dollars each, which is 18"),
    ("18", "Janet has 16 eggs, eats 3, bakes with 4, and sells 9 at 2 dollars"),
    ("18", r"\boxed{17}"),
    ("18", r"I first thought \boxed{17}, but it is \boxed{18}."),
    ("18", r"I first thought \boxed{18}, but it is \boxed{17}."),
    ("70000", r"His profit is \boxed{\$70,000}."),
    ("70000", "The answer is 70,000."),
    ("10,\\!080", r"\boxed{10080}"),
    ("58,500", r"\boxed{58500}"),
    ("11,\\! 111,\\! 111,\\! 100", r"\boxed{11,111,111,100}"),
    ("-3", r"\boxed{-3}"),
    ("-3", r"\boxed{3}"),
    ("0", r"\boxed{0}"),
    ("0", r"\boxed{1}"),
    # roots, pi, sums
    (r"3\sqrt{13}", r"\boxed{\sqrt{117}}"),
    (r"3\sqrt{13}", r"\boxed{3\sqrt{13}}"),
    (r"3\sqrt{13}", r"\boxed{10.8167}"),
    (r"3\sqrt{13}", r"\boxed{13\sqrt{3}}"),
    (r"11\sqrt2", r"\boxed{11\sqrt{2}}"),
    (r"12\pi", r"\boxed{12\pi}"),
    (r"12\pi", r"\boxed{37.699}"),
    (r"18+2\pi", r"\boxed{2(\pi+9)}"),
    (r"1+2\sqrt{3}", r"\boxed{2\sqrt{3}+1}"),
    (r"\frac{\sqrt{3}}{3}", r"\boxed{\frac{1}{\sqrt{3}}}"),
    (r"\frac{20000}{\pi}", r"\boxed{\frac{20000}{\pi}}"),
    ("6 - 5i", r"\boxed{6-5i}"),
    ("6 - 5i", r"\boxed{6+5i}"),
    # expressions and equations
    ("p - q", r"\boxed{p - q}"),
    ("p - q", r"\boxed{-q+p}"),
    ("p - q", r"\boxed{q-p}"),
    ("6r^2-4r-24", r"\boxed{2(3r^2-2r-12)}"),
    ("(a+5)(b+2)", r"\boxed{(b+2)(a+5)}"),
    ("(a+5)(b+2)", r"\boxed{ab+2a+5b+10}"),
    ("x=5", r"\boxed{x=5}"),
    ("x=5", r"\boxed{5}"),
    ("5", r"\boxed{x=5}"),
    ("5", r"\boxed{x = 5 \text{ cm}}"),
    ("y = 2x + 3", r"\boxed{y = 2x + 3}"),
    ("y = 2x + 3", r"\boxed{2x + 3}"),
    ("y = 2x + 3", r"\boxed{y = 3x + 2}"),
    (r"\cot x", r"\boxed{\cot x}"),
    (r"\cot x", r"\boxed{\frac{\cos x}{\sin x}}"),
    # tuples, intervals, sets
    ("(8,-2)", r"\boxed{(8, -2)}"),
    ("(8,-2)", r"\boxed{(-2, 8)}"),
    (r"\left( 3, \frac{\pi}{2} \right)", r"\boxed{\left(3, \frac{\pi}{2}\right)}"),
    (r"\left( 3, \frac{\pi}{2} \right)", r"\boxed{(3, \pi/2)}"),
    (r"\left( 3, \frac{\pi}{2} \right)", r"\boxed{(3, 90^\circ)}"),
    ("(3,4]", r"\boxed{(3,4]}"),
    ("(3,4]", r"\boxed{[3,4]}"),
    ("(3,4]", r"\boxed{3 < x \le 4}"),
    (r"(2,\infty)", r"\boxed{(2, \infty)}"),
    (r"(2,\infty)", r"\boxed{x > 2}"),
    (r"(-\infty, 2) \cup (3, \infty)", r"\boxed{(-\infty,2)\cup(3,\infty)}"),
    (r"(-\infty, 2) \cup (3, \infty)", r"\boxed{(3,\infty) \cup (-\infty,2)}"),
    (r"(-\infty, 2) \cup (3, \infty)", r"\boxed{(-\infty,2)}"),
    (r"x \in [-2,7]", r"\boxed{[-2,7]}"),
    (r"x \in [-2,7]", r"\boxed{x \in [-2,7]}"),
    (r"x \in [-2,7]", r"\boxed{(-2,7)}"),
    ("1,-2", r"\boxed{1,-2}"),
    ("1,-2", r"\boxed{-2, 1}"),
    ("1,-2", r"\boxed{\{-2, 1\}}"),
    ("1,-2", r"\boxed{1}"),
    ("3, 5, 7", r"\boxed{3, 5, 7}"),
    ("3, 5, 7", r"\boxed{3, 5}"),
    ("3, 5, 7", r"The values are $\boxed{3}$, $\boxed{5}$ and $\boxed{7}$."),
    (r"1 \pm \sqrt{19}", r"\boxed{1 \pm \sqrt{19}}"),
    (r"1 \pm \sqrt{19}", r"\boxed{1+\sqrt{19}, 1-\sqrt{19}}"),
    (r"\{1\pm\sqrt{5},-2\}", r"\boxed{\{-2, 1+\sqrt{5}, 1-\sqrt{5}\}}"),
    # matrices
    (r"\begin{pmatrix} -1 & 0 \\ 0 & -1 \end{pmatrix}", r"\boxed{\begin{pmatrix} -1 & 0 \\ 0 & -1 \end{pmatrix}}"),
    (r"\begin{pmatrix} -1 & 0 \\ 0 & -1 \end{pmatrix}", r"\boxed{\begin{pmatrix} 1 & 0 \\ 0 & 1 \end{pmatrix}}"),
    (r"\begin{pmatrix} 1/5 \\ -18/5 \end{pmatrix}", r"\boxed{\begin{pmatrix} 0.2 \\ -3.6 \end{pmatrix}}"),
    # units, degrees, money, percent, bases
    (r"106^\circ", r"\boxed{106^\circ}"),
    (r"106^\circ", r"\boxed{106}"),
    (r"106^\circ", r"\boxed{106 \text{ degrees}}"),
    (r"\$18.90", r"\boxed{\$18.90}"),
    (r"\$18.90", r"\boxed{18.9}"),
    (r"5.4 \text{ cents}", r"\boxed{5.4}"),
    (r"5.4 \text{ cents}", r"\boxed{5.4 \text{ cents}}"),
    (r"15\mbox{ cm}^2", r"\boxed{15}"),
    (r"15\mbox{ cm}^2", r"\boxed{15 \text{ cm}^2}"),
    ("25", r"\boxed{25\%}"),
    ("25", "The answer is 25%."),
    ("25", r"\boxed{0.25}"),
    (r"2516_8", r"\boxed{2516_8}"),
    (r"2516_8", r"\boxed{2516}"),
    # words
    (r"\text{Evelyn}", r"\boxed{\text{Evelyn}}"),
    (r"\text{Evelyn}", r"\boxed{Evelyn}"),
    (r"\text{Evelyn}", r"\boxed{\text{Briana}}"),
    (r"\text{east}", r"\boxed{\text{east}}"),
    (r"\text{(C)}", r"\boxed{\text{(C)}}"),
    (r"\text{(C)}", r"\boxed{C}"),
    (r"\text{even}", r"\boxed{\text{odd}}"),
    # cut off, empty, in the thinking
    ("42", r"We get $6 \cdot 7$, so the answer is \boxed{4"),
    ("42", r"We get $6 \cdot 7$, so the answer is \boxed{"),
    ("42", r"\boxed{}"),
    ("42", ""),
    ("42", "I do not know."),
    ("42", "Let me think again. First, 6 times 7 is 42, and then we need to subtract 5"),
]


def main() -> None:
    """One JSON line for the versions, then one a pair."""
    from lighteval.metrics.dynamic_metrics import MultilingualExtractiveMatchMetric
    from lighteval.metrics.utils.extractive_match_utils import ExprExtractionConfig, LatexExtractionConfig
    from lighteval.models.model_output import ModelResponse
    from lighteval.tasks.requests import Doc
    from lighteval.utils.language import Language

    metric = MultilingualExtractiveMatchMetric(
        language=Language.ENGLISH,
        fallback_mode="first_match",
        precision=5,
        gold_extraction_target=(LatexExtractionConfig(),),
        pred_extraction_target=(ExprExtractionConfig(), LatexExtractionConfig(boxed_match_priority=0)),
        aggregation_function=max,
    )
    print(json.dumps({name: version(name) for name in ("lighteval", "latex2sympy2_extended", "sympy")}))
    for reference, reply in PAIRS:
        doc = Doc(query="", choices=[f"${reference}$"], gold_index=0)
        same = metric.compute(doc, ModelResponse(text=[reply])) == 1.0
        print(json.dumps({"reference": reference, "reply": reply, "same": same}))


if __name__ == "__main__":
    main()
