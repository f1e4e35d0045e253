"""The rules of the repository that a reader relies on."""

from __future__ import annotations

import ast
import graphlib
import re
from pathlib import Path

from each import each, name_of

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
ENGINE = sorted((ROOT / "kvpress").rglob("*.py"))
POLICIES = [path.stem for path in (ROOT / "policies").glob("*.py") if path.stem != "__init__"]
EXAMPLE = ROOT / "tests" / "tools" / "value_norm.py"  # of CONTRIBUTING.md
POLICY_FILES = [*(ROOT / "policies" / f"{name}.py" for name in POLICIES), EXAMPLE]

# A room imports only from itself and from rooms before it; those of one line are strangers.
ROOMS = [
    {"errors", "host", "types"},
    {"env"},
    {"formulas", "ops", "report", "parallel"},
    {"policy", "store"},
    {"pipe.state"},
    {"pipe.stages"},
    {"pipe"},
    {"hf"},
    {"engine"},
    {"batching"},
    {"__init__", "csrc", "policies"},
    {"bench"},
    {"serve"},
    {"cli"},
    {"__main__"},
]
RANK = {room: rank for rank, rooms in enumerate(ROOMS) for room in rooms}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT / "kvpress").with_suffix("").parts)


def room(module: str) -> str:
    """`pipe.stages.select` -> `pipe.stages`, `store.rows` -> `store`; `""` -> `__init__`."""
    first, *rest = module.split(".")
    inner = f"{first}.{rest[0]}" if rest else ""
    return inner if inner in RANK else first or "__init__"


def imported(path: Path) -> set[str]:
    """Modules of the engine that a file imports, below `kvpress`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "kvpress":
            package = node.module.removeprefix("kvpress").removeprefix(".")
            names = {f"{package}.{alias.name}".strip(".") for alias in node.names}
            modules = {
                name for name in names if (ROOT / "kvpress" / name.replace(".", "/")).exists()
            }
            files = {n for n in names if (ROOT / "kvpress" / f"{n.replace('.', '/')}.py").exists()}
            aliases = {name for name in names if name in RANK}
            found |= (modules | files | aliases) or {package}
        if isinstance(node, ast.Import):
            named = [alias.name for alias in node.names if alias.name.startswith("kvpress.")]
            found |= {name.removeprefix("kvpress.") for name in named}
    return found


@each(ENGINE, module_name)
def test_imports_run_one_way(path: Path) -> None:
    own = module_name(path)
    for other in imported(path) if own != "__init__" else ():  # whose imports are lazy
        before = RANK[room(other)] < RANK[room(own)]
        assert before or room(other) == room(own), f"{own} imports {other}, a room after its own"
        assert room(own) != "pipe.stages" or before, f"the stage {own} imports the stage {other}"


BESIDE = {
    "csrc": {"csrc", "formulas", "ops", "types", "errors", "host"},
    "policies": {"policy", "ops"},
}
OTHERS = [path for tree in BESIDE for path in sorted((ROOT / tree).rglob("*.py"))]


@each(OTHERS, name_of)
def test_operators_and_policies_import_few_rooms(path: Path) -> None:
    allowed = BESIDE[path.relative_to(ROOT).parts[0]]
    assert {room(module) for module in imported(path)} <= allowed


def test_imports_say_where_from() -> None:
    """No relative ones, which the rules above would not see."""
    trees = [ROOT / tree for tree in ("kvpress", "csrc", "policies", "bench")]
    for path in (path for tree in trees for path in tree.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            assert not isinstance(node, ast.ImportFrom) or not node.level, path


def test_no_module_imports_one_that_imports_it() -> None:
    graph = {module_name(path): imported(path) for path in ENGINE}
    graph = {own: {n if n in graph else f"{n}.__init__" for n in to} for own, to in graph.items()}
    tuple(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError


def test_the_package_shows_few_entries() -> None:
    shown = {p.name for p in (ROOT / "kvpress").iterdir()} - {"__pycache__"}
    assert len(shown) <= 19, sorted(shown)


@each(ENGINE, module_name)
def test_only_one_package_imports_transformers(path: Path) -> None:
    uses = re.search(r"^\s*(from|import) transformers\b", path.read_text(encoding="utf-8"), re.M)
    assert not uses or room(module_name(path)) == "hf"


@each(ENGINE, module_name)
def test_only_reports_and_the_command_line_import_rich(path: Path) -> None:
    uses = re.search(r"^\s*(from|import) rich\b", path.read_text(encoding="utf-8"), re.M)
    assert not uses or room(module_name(path)) in {"report", "cli"}


@each(ENGINE, module_name)
def test_the_engine_names_no_policy(path: Path) -> None:
    """Not even in a docstring. Some names are ordinary words: there quoting it is forbidden."""
    text = path.read_text(encoding="utf-8").lower()
    words = {"full", "random", "heads"}
    for name in POLICIES:
        pattern = f"[\"']{name}[\"':]" if name in words else rf"\b{name}\b"
        found = re.findall(pattern, text)
        assert not found or (module_name(path), name) == ("types", "full")  # a layer kind


@each(POLICY_FILES, name_of)
def test_policies_import_only_the_engine_and_torch(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    allowed = {"kvpress", "torch", "collections", "dataclasses", "fractions", "itertools"}
    allowed |= {"typing", "math", "__future__"}
    for node in ast.walk(tree):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for module in names:
            assert module.split(".")[0] in allowed
            assert not module.startswith(("kvpress.policies", "kvpress.bench"))


@each(POLICY_FILES, name_of)
def test_policy_files_are_small_and_cite_their_source(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    doc = ast.get_docstring(tree) or ""
    assert "Differs from the paper:" in doc
    code = [line for line in text.replace(doc, "").splitlines() if line.strip(' "')]
    # More where a method has 18 options, or three ways of choosing.
    most = {"d2o": 72, "think": 88, "zap": 62}.get(path.stem, 60)
    assert len([line for line in code if not line.strip().startswith("#")]) <= most


SUFFIX = re.compile(r"\b_?[a-z][a-z0-9_]*?_([A-Za-z0-9]*[A-Z][A-Za-z0-9]*)\b")
WITH_SHAPES = sorted(
    path
    for tree in ("kvpress", "csrc", "policies", "bench")
    for path in (ROOT / tree).rglob("*.py")
)


@each(WITH_SHAPES, name_of)
def test_every_letter_of_a_shape_is_in_the_legend(path: Path) -> None:
    from kvpress.types import LEGEND

    for name in SUFFIX.finditer(path.read_text(encoding="utf-8")):
        letters = set(name.group(1).upper()) - set("0123456789")
        assert letters <= LEGEND.keys(), f"{name.group(0)}: {letters - LEGEND.keys()}"


SCRIPTS = [p for folder in ("scripts", ".ci") for p in (ROOT / folder).rglob("*") if p.is_file()]


@each(SCRIPTS, name_of)
def test_scripts_name_what_is_there(path: Path) -> None:
    """Tests by their paths, the slow ones of a list by folder/name, modules where they are."""
    text = path.read_text(encoding="utf-8")
    for name in re.findall(r"\btests/[\w/]*\w(?:\.py)?", text):
        assert (ROOT / name).exists(), name
    for folder, name in re.findall(
        r"(\w+)/(\w+)", "".join(re.findall(r"for slow in (.*?);", text, re.S))
    ):
        assert (ROOT / "tests" / folder / f"test_{name}.py").exists(), f"{folder}/{name}"
    for module in re.findall(r"(?:from|-m) kvpress\.([\w.]+)", text):
        tree, _, rest = module.partition(".")
        at = (
            ROOT
            / ("" if tree in {"bench", "csrc", "policies"} else "kvpress")
            / tree
            / rest.replace(".", "/")
        )
        assert at.is_dir() or at.with_suffix(".py").is_file(), module


def test_package_list_equals_the_folders() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    listed = set(settings["tool"]["setuptools"]["packages"])
    mapping = settings["tool"]["setuptools"]["package-dir"]
    found = set()
    for package, folder in mapping.items():
        for init in (ROOT / folder).rglob("__init__.py"):
            tail = init.parent.relative_to(ROOT / folder).parts
            found.add(".".join((package, *tail)))
    assert listed == found


def test_every_environment_variable_is_declared_and_documented() -> None:
    from kvpress import env

    page = (ROOT / "docs" / "environment.md").read_text(encoding="utf-8")
    folders = ("kvpress", "policies", "csrc", "bench")
    texts = [p.read_text("utf-8") for folder in folders for p in (ROOT / folder).rglob("*.py")]
    used = {name for text in texts for name in re.findall(r"KVPRESS_[A-Z]+", text)}
    assert used == set(env.VARIABLES)
    assert all(name in page for name in used)


@each(ENGINE, module_name)
def test_user_errors_are_exceptions_of_the_engine(path: Path) -> None:
    """No bare Exception, ValueError or RuntimeError is raised."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            name = getattr(node.exc.func, "id", getattr(node.exc.func, "attr", ""))
            assert name not in {"Exception", "ValueError", "RuntimeError", "TypeError", "KeyError"}


FACTORIES = {
    *("arange", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "normal", "ones"),
    *("rand", "randint", "randn", "randperm", "scalar_tensor", "tensor", "zeros"),
}
WHOLE = {"arange", "randint", "randperm"}  # of whole numbers, if it gets such
TENSORS = [
    path
    for path in sorted((*ENGINE, *(ROOT / "policies").glob("*.py"), *(ROOT / "csrc").rglob("*.py")))
    if "torch." in path.read_text(encoding="utf-8")
]


@each(TENSORS, name_of)
def test_no_tensor_depends_on_the_defaults_of_the_process(path: Path) -> None:
    """`torch.set_default_dtype` and `set_default_device` belong to the user; see host.py."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        name, named = node.func.attr, {keyword.arg for keyword in node.keywords}
        of_torch = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
        if of_torch and name == "as_tensor":
            assert "device" in named, f"line {node.lineno}: {ast.unparse(node)}"
        if of_torch and name in FACTORIES and None not in named:
            missing = {"device"} if name in WHOLE else {"dtype", "device"}
            assert missing <= named, f"line {node.lineno}: {ast.unparse(node)}"


# A package of bench imports only from its own line and from the lines above it.
BENCH = [
    {"common"},
    {"shards"},
    {"operators", "quality", "run"},
    {"calibrate"},
    {"sparse", "distill"},
    {"speed", "retrieval"},
    {"peers", "gpu", "plan", "serving", "tiers"},
    {"view", "pages"},
    {"commands", "docs"},
]
BENCH_FILES = sorted((ROOT / "bench").rglob("*.py"))


def bench_imports(path: Path) -> set[str]:
    """Modules of bench that a file imports, anywhere in it, below `kvpress.bench`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith("kvpress.bench."):
            tail = node.module.removeprefix("kvpress.bench").strip(".")
            for alias in node.names:
                name = f"{tail}.{alias.name}".strip(".")
                file = ROOT / "bench" / f"{name.replace('.', '/')}.py"
                found.add(name if file.exists() else tail)
    return found


def test_packages_of_bench_import_one_way() -> None:
    rank = {name: number for number, names in enumerate(BENCH) for name in names}
    arrows = {}
    for path in BENCH_FILES:
        parts = path.relative_to(ROOT / "bench").with_suffix("").parts
        if parts == ("__init__",):
            continue
        arrows[".".join(parts)] = found = bench_imports(path)
        for home in {name.split(".")[0] for name in found} - {parts[0]}:
            assert rank[home] < rank[parts[0]], f"{path} imports {home}, which is not below it"
    graphlib.TopologicalSorter(arrows).prepare()  # raises CycleError
