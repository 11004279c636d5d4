"""Solutions run, exercises are made from them and hold no answer, wrong answers are told why."""

import contextlib
import importlib.util
import io
import json
import re
import sys
from pathlib import Path

import pytest
from test_notebooks import ABSOLUTE, code_cells, execute, outputs, text_of

FOLDER = Path(__file__).parent.parent / "notebooks"
SOLUTIONS = sorted((FOLDER / "solutions").glob("*.ipynb"))
spec = importlib.util.spec_from_file_location("make_exercises", FOLDER / "make_exercises.py")
make_exercises = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_exercises)


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def source(cell):
    return "".join(cell["source"])


def grade_id(cell):
    return cell["metadata"].get("nbgrader", {}).get("grade_id", "")


def run_cells(notebook, monkeypatch, until, replace=None):
    """Executes the code cells up to the one with grade_id `until`, in this process."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(FOLDER)
    names = {}
    with contextlib.redirect_stdout(io.StringIO()):
        for cell in code_cells(notebook):
            code = (replace or {}).get(grade_id(cell), source(cell))
            exec(compile(code, grade_id(cell) or "cell", "exec"), names)
            if grade_id(cell) == until:
                return
    raise AssertionError(f"no cell {until}")


def test_there_are_solutions_and_each_belongs_to_a_notebook():
    assert SOLUTIONS
    for path in SOLUTIONS:
        notebook = FOLDER / path.name
        assert notebook.exists()
        assert f"exercises/{path.name}" in text_of(read(notebook)), f"{path.name} is not mentioned"


def test_the_committed_exercises_are_those_of_the_solutions():
    exercises = {p.name: p.read_text(encoding="utf-8") for p in FOLDER.glob("exercises/*.ipynb")}
    made = {p.name: make_exercises.exercise(p.read_text(encoding="utf-8")) for p in SOLUTIONS}
    assert exercises.keys() == made.keys()
    for name, text in made.items():
        assert exercises[name] == text, f"{name}: run python notebooks/make_exercises.py"


@pytest.mark.parametrize("path", SOLUTIONS, ids=lambda p: p.stem)
def test_the_exercises_hold_no_solution(path):
    solution, exercise = read(path), read(FOLDER / "exercises" / path.name)
    text = text_of(exercise)
    assert make_exercises.BEGIN not in text and make_exercises.END not in text
    assert not outputs(exercise)
    pattern = f"{make_exercises.BEGIN}\n(.*?) *{make_exercises.END}"
    answers = re.findall(pattern, text_of(solution), re.DOTALL)
    assert len(answers) == text.count(make_exercises.STUB) >= 2
    for answer in answers:
        assert answer.strip() and answer.strip() not in text


@pytest.mark.parametrize("path", SOLUTIONS, ids=lambda p: p.stem)
def test_markers_and_metadata_are_nbgraders(path):
    cells = [c for c in code_cells(read(path)) if "nbgrader" in c["metadata"]]
    answers, checks = cells[::2], cells[1::2]
    assert len({grade_id(c) for c in cells}) == len(cells) == 2 * len(checks) >= 4
    for answer, check in zip(answers, checks):
        assert grade_id(answer).replace("answer", "check") == grade_id(check)
        about, graded = answer["metadata"]["nbgrader"], check["metadata"]["nbgrader"]
        assert about["solution"] and not about["grade"] and make_exercises.BEGIN in source(answer)
        assert graded["grade"] and graded["locked"] and graded["points"] > 0
        assert make_exercises.BEGIN not in source(check)
    for cell in code_cells(read(path)):
        assert make_exercises.BEGIN not in source(cell) or cell in answers


def test_odd_markers_are_refused():
    begin, end = make_exercises.BEGIN, make_exercises.END
    for lines in ([begin], [end], [begin, begin, end], [begin, end, end]):
        with pytest.raises(ValueError, match="###"):
            make_exercises.without_solution([f"{line}\n" for line in lines])
    code = ["def f():\n", f"    {begin}\n", "    return 1\n", f"    {end}\n", "\n", "f()"]
    stub = ["def f():\n", f"    {make_exercises.STUB}\n", "\n", "f()"]
    assert make_exercises.without_solution(code) == stub


@pytest.mark.filterwarnings("default")  # Jupyter's own warnings are not ours to mend
@pytest.mark.parametrize("path", SOLUTIONS, ids=lambda p: p.stem)
def test_the_solutions_run(path):
    notebook = execute(path, timeout=60)
    assert not ABSOLUTE.search(text_of(notebook))
    for cell in code_cells(notebook):  # each check says that its exercise is right
        if grade_id(cell).startswith("check"):
            printed = "".join(output.get("text", "") for output in cell["outputs"])
            assert f"exercise {grade_id(cell)[-1]}: right" in printed


@pytest.mark.parametrize("path", SOLUTIONS, ids=lambda p: p.stem)
def test_an_exercise_not_done_says_so(path, monkeypatch):
    exercise = read(FOLDER / "exercises" / path.name)
    for cell in code_cells(exercise):
        if grade_id(cell).startswith("check"):
            skipped = {
                grade_id(c): "" for c in code_cells(exercise)
                if grade_id(c).startswith("check") and c is not cell
            }  # fmt: skip
            with pytest.raises(NotImplementedError, match="your code"):
                run_cells(exercise, monkeypatch, grade_id(cell), skipped)


ANSWERS = [(p, grade_id(c)) for p in SOLUTIONS for c in code_cells(read(p))
           if grade_id(c).startswith("answer")]  # fmt: skip
SOLUTION = re.compile(
    rf"def (\w+)\([^\n]*\n(?:[^\n]*\n)?( *){make_exercises.BEGIN}\n.*?{make_exercises.END}",
    re.DOTALL,
)


RETURNED = "", "return np.array(0.5)", "return [None]", "return {}", "return [[1], [1, 2]]"


@pytest.mark.parametrize("returned", RETURNED)
@pytest.mark.parametrize("path, answer", ANSWERS, ids=lambda x: x if isinstance(x, str) else "")
def test_what_is_no_result_gets_a_hint_and_a_forgotten_return_is_named(
    path, answer, returned, monkeypatch
):
    notebook = read(path)
    cell = next(source(c) for c in code_cells(notebook) if grade_id(c) == answer)
    found = list(SOLUTION.finditer(cell))
    assert len(found) == cell.count(make_exercises.BEGIN)
    for match in found:
        wrong = cell[: match.start(2)] + match[2] + (returned or "pass") + cell[match.end() :]
        hint = r"\w" if returned else f"{match[1]} gives back nothing: .*return"
        with pytest.raises(AssertionError, match=hint):
            run_cells(notebook, monkeypatch, answer.replace("answer", "check"), {answer: wrong})


def test_lists_are_taken_for_the_arrays_that_they_are(monkeypatch):
    whole = "def together():\n    return 2 * ([[0, -1, 0], [1, 0, 0], [0, 0, 0]],)"
    for answer, name in (("02-1", "second_order"), ("04-1", "dalpha_from_output"), ("02-1", "")):
        (path,) = (p for p in SOLUTIONS if p.name[:2] == answer[:2])
        cell = next(source(c) for c in code_cells(read(path)) if grade_id(c) == f"answer-{answer}")
        lists = f"def {name}(*args, f={name}):\n    return f(*args).tolist()"
        cell += "\n\n" + (lists if name else whole)
        run_cells(read(path), monkeypatch, f"check-{answer}", {f"answer-{answer}": cell})


# grade_id of an answer: (a plausible wrong answer, what the check says).  Functions that are not
# given here keep the definition of the solution.
WRONG = {
    "answer-00-1": (
        "def by_hand():\n    S = np.zeros((4, 4)); S[0, 1], S[1, 0] = -np.pi / 2, np.pi / 2\n"
        "    return S, np.pi / 2, np.eye(4)",
        "the sign of S is wrong",
    ),
    "answer-00-2": (
        "def fractions(t):\n    return (np.sin(t) / t, (1 - np.cos(t)) / t**2) if t else (1, 0.5)",
        "does 1 - cos cancel",
    ),
    "answer-00-3": (
        "def undo(O, Q, K, alpha):\n    return osa_forward(Q, K, O, alpha)[0]",
        "once more in the same direction",
    ),
    "answer-01-1": (
        "def stack(As, x):\n    b = np.ptp(x)\n    for A in As[::-1]:\n"
        "        x, b = A @ x, b * tau(A)\n    return np.ptp(x), b",
        "is A_1 applied first",
    ),
    "answer-01-2": (
        "def epsilon(Q, K, V, alpha):\n"
        "    n = lambda M: np.linalg.norm(M, 2, axis=(-2, -1)) ** 2\n"
        "    return np.sqrt((4 * alpha**2 * (n(Q) + n(K)) * n(V)).sum())",
        "divided by the root of d_v",
    ),
    "answer-01-3": ("def equal():\n    return smaller()", "how large may a . b be"),
    "answer-02-1": (
        "def second_order(S1, S2):\n    return S1 @ S2 - S2 @ S1",
        "something of order t.2 is left",
    ),
    "answer-02-2": (
        "def cayley_attention(Q, K, V, alpha):\n    return cayley(skew_scores(Q, K, alpha)) @ V",
        "is there an N x N matrix",
    ),
    "answer-02-3": (
        "def block_causal(sizes, rng):\n    return np.eye(sum(sizes))",
        "all tokens may be mixed",
    ),
    "answer-03-1": (
        "def what_it_is(Q, K, alpha):\n    return skew_scores(Q, K, alpha)",
        "this is S itself",
    ),
    "answer-03-2": (
        "def padded_attention(Q, K, V, alpha, valid):\n    m = valid[..., None]\n"
        "    return osa_forward(Q * m, K * m, V * m, alpha)[0]",
        "V is not to be masked",
    ),
    "answer-03-3": (
        "def growth_order_constant():\n    return 1.5, 2, 1.5",
        "the growth factor is the derivative of g at 0",
    ),
    "answer-04-1": (
        "def dalpha_from_output(dO, O, Q, K):\n"
        "    return (dO * ((Q @ K.T - K @ Q.T) @ O)).sum() / np.sqrt(Q.shape[1])",
        "in which order are the products taken",
    ),
    "answer-04-2": (
        "def gradients_at_zero(dO, Q, K, V):\n    return 0 * Q, 0 * K, dO, 0.0",
        "nothing could ever be learnt",
    ),
    "answer-04-3": (
        "def qr_vjp(Bbar, Rbar, B, R):\n"
        "    return np.linalg.solve(R, (Bbar + B @ np.tril(R @ Rbar.T)).T).T",
        "the VJP gives .* the derivative",
    ),
    "answer-05-1": (
        "def softmax_backward(g, p):\n    return [p * g - p * p * g.sum(-1, keepdims=True)]",
        "the gradient for a cotangent of ones",
    ),
    "answer-05-2": (
        "def kahn(output):\n    order, queue = [output], [output]\n    while queue:\n"
        "        for p in queue.pop(0).parents:\n            if p not in order:\n"
        "                order.append(p); queue.append(p)\n    return order",
        "before all of its users had theirs",
    ),
    "answer-05-3": (
        "def pick(index):\n    def backward(g, n):\n        full = np.zeros((n, *g.shape[1:]))\n"
        "        full[index] += g\n        return [full]\n"
        "    return operator(lambda x: (x[index], len(x)), backward)",
        "not the last of them",
    ),
    "answer-06-1": (
        "def terms(X, W_QK, W_V, alpha, all=terms):\n"
        "    first, second, third = all(X, W_QK, W_V, alpha)\n"
        "    each = [all(X, W_QK, W_V, a * (np.arange(len(alpha)) == i)[:, None, None])[1]\n"
        "            for i, a in enumerate(alpha)]\n"
        "    return first, np.sqrt(np.sum(np.square(each))), third",
        "put the heads side by side before the norm is taken",
    ),
    "answer-06-2": (
        "def wide(d, ratio, slope, rng, right=wide):\n"
        "    return *right(d, ratio, slope, rng)[:2], np.sqrt(2 / (1 + slope**2))",
        "where does the ratio enter the gain",
    ),
    "answer-06-3": (
        "def centred_bound(X, W_QK, W_V, alpha):\n    C = X - X.mean(0)\n"
        "    more = np.linalg.norm(X, 2) / np.linalg.norm(C, 2)\n"
        "    return more * jacobian_bound(C, W_QK, W_V, alpha)",
        "where does V stand in D",
    ),
    "answer-07-1": (
        "def angle(a, l):\n    return 1 / (kappa(a) * l)",
        "is the third of w.3/3 there",
    ),
    "answer-07-2": (
        "def out_of_reach(eta, right=out_of_reach):\n    depth = right(eta)[0] + 1\n"
        "    return depth, tailored_slope(depth, eta)",
        "one layer fewer is enough",
    ),
    "answer-07-3": (
        "def kappa_tied(a, m):\n    return kappa(a)",
        "the usual MLP has",
    ),
    "answer-08-1": (
        "def by_hand(N):\n    return 1 / np.sqrt(N), 1 / N, 0.0",
        "before the part along v is removed",
    ),
    "answer-08-2": (
        "def z_rows(V, theta):\n    Z = V.copy()\n"
        "    Z[0], Z[1] = np.sin(theta) * V[1], -np.sin(theta) * V[0]\n    return Z",
        "what does XSA then remove",
    ),
    "answer-08-3": (
        "def exclusive(Q, K, V, alpha):\n    Y = osa_forward(Q, K, V, alpha)[0]\n"
        "    return Y - (Y * V).sum(1, keepdims=True) / (V * V).sum(1, keepdims=True) * V",
        "only rounding is left",
    ),
    "answer-09-1": (
        "def noisy_rows(X, rng):\n    return noisy_rows_numpy(X, rng)",
        "on the stand-in for a GPU",
    ),
    "answer-09-2": (
        "def pays_from(d_v, k):\n    return 46 * d_v // 14 + 1",
        "is the series counted",
    ),
    "answer-09-3": (
        "def means(losses, every):\n    return means_waiting(losses, every)",
        "20 waits for two means|25 waits for two means",
    ),
}


def test_every_exercise_has_a_wrong_answer():
    ids = {
        grade_id(c) for p in SOLUTIONS for c in code_cells(read(p)) if "nbgrader" in c["metadata"]
    }
    assert {i for i in ids if i.startswith("answer")} == WRONG.keys()


@pytest.mark.parametrize("answer", WRONG)
def test_a_wrong_answer_is_told_what_is_wrong(answer, monkeypatch):
    code, message = WRONG[answer]
    path = next(p for p in SOLUTIONS if p.name[:2] == answer[7:9])
    notebook = read(path)
    right = next(source(c) for c in code_cells(notebook) if grade_id(c) == answer)
    with pytest.raises(AssertionError, match=message):
        run_cells(
            notebook, monkeypatch, answer.replace("answer", "check"), {answer: f"{right}\n\n{code}"}
        )
