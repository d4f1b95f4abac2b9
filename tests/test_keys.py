"""Config keys declared in dataclasses: the node, every kind of wrong value, and the reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Annotated, Literal

from kd_d2.distillers import DISTILLER_REGISTRY, Distiller
from kd_d2.errors import UserError
from kd_d2.keys import Above, AtLeast, AtMost, Below, Condition, Keys, OneOf, keys_of
from kd_d2.modeling import MODELING_KEYS
from kd_d2.reference import config_reference

import pytest
from detectron2.config import CfgNode

pytestmark = pytest.mark.unit

EVEN = Condition("even", lambda value: value % 2 == 0)


@dataclass(frozen=True)
class Toy(Keys):
    flag: Annotated[bool, "Yes or no."] = True
    count: Annotated[int, AtLeast(1), "How many."] = 3
    rate: Annotated[float, Above(0), "How fast."] = 0.5
    share: Annotated[float, AtLeast(0), Below(1), "How much."] = 0.25
    part: Annotated[float, Above(0), AtMost(1), "How much of the rest."] = 1.0
    pairs: Annotated[int, EVEN, "How many, in pairs."] = 2
    limit: Annotated[float | None, AtLeast(0), "At most; None for no limit."] = None
    name: str = ""
    where: Literal["here", "there"] = "here"
    whose: Literal[None, "mine"] = None
    what: Annotated[str, OneOf("a", "b"), "Which."] = "a"
    sizes: tuple[float, float, float] = (1.0, 2.0, 3.0)
    words: tuple[str, ...] = ("x",)
    sides: tuple[Literal["left", "right"], ...] = ()
    anything: list = field(default_factory=list)

    def check(self, name: str) -> None:
        if self.flag and self.count == 13:
            raise UserError(f"{name}.COUNT is 13, which FLAG does not like.")


@dataclass(frozen=True)
class Heir(Toy):
    count: int = 7
    more: Annotated[int, "Its own."] = 1


def _read(keys: type[Keys] = Toy, **values: object) -> Keys:
    node = CfgNode()
    keys.add_to(node)
    for name, value in values.items():
        node[name] = value
    return keys.read(node, "MODEL.TOY")


def test_the_node_and_back() -> None:
    """Check names, order and defaults, reading values back, and lists where tuples are declared."""
    node = CfgNode()
    Toy.add_to(node)
    assert list(node) == [name.upper() for name in Toy.__dataclass_fields__]
    assert (node.COUNT, node.LIMIT, node.SIZES, node.ANYTHING) == (3, None, (1.0, 2.0, 3.0), [])
    node.ANYTHING.append(1)
    assert Toy().anything == []
    assert _read() == Toy()
    read = _read(RATE=2, LIMIT=0, SIZES=[3, 4, 5.5], WORDS=[], SIDES=["left"], ANYTHING=(1, "x"), WHOSE="mine")
    assert (read.rate, read.limit, read.sizes, read.words, read.sides) == (2, 0, (3, 4, 5.5), (), ("left",))
    assert (read.anything, read.whose) == ((1, "x"), "mine")


def test_the_default_of_a_float_may_be_written_as_a_whole_number() -> None:
    @dataclass(frozen=True)
    class Whole(Keys):
        rate: Annotated[float, AtLeast(0), "How fast."] = 1
        limit: float | None = 0

    assert [(key.default, type(key.default)) for key in keys_of(Whole)] == [(1.0, float), (0.0, float)]


def test_an_heir_states_a_default_anew() -> None:
    """Check that its own keys follow those of its base, and that a key with a new default keeps its position."""
    assert [key.name for key in keys_of(Heir)] == [*(key.name for key in keys_of(Toy)), "MORE"]
    assert _read(Heir).count == 7 and _read(Heir, COUNT=0).count == 0


@pytest.mark.parametrize(
    ("key", "values", "must"),
    [
        ("FLAG", [1, "True", None], "True or False"),
        ("COUNT", [0, 1.0, True, "3", None], "a whole number at least 1"),
        ("RATE", [0, -1.0, math.nan, math.inf, True, "fast", None], "a number above 0"),
        ("SHARE", [-0.1, 1, 1.0, "half"], "a number from 0 to below 1"),
        ("PART", [0, 1.5, None], "a number above 0 and at most 1"),
        ("PAIRS", [3, 2.0], "even"),
        ("LIMIT", [-1, math.nan, "none"], "None or a number at least 0"),
        ("NAME", [1, None, ("a",)], "a string"),
        ("WHERE", ["nowhere", None, 1], "one of 'here', 'there'"),
        ("WHOSE", ["yours", 0], "one of None, 'mine'"),
        ("WHAT", ["c", None, ["a"]], "one of 'a', 'b'"),
        ("SIZES", [(1, 2), (1, 2, "x"), 3, None, "abc"], "three numbers"),
        ("WORDS", ["x", (1,), None], "a list of strings"),
        ("SIDES", [("left", "up"), "left"], "a list whose entries are one of 'left', 'right'"),
        ("ANYTHING", ["x", None], "a list"),
    ],
)
def test_wrong_values(key: str, values: list, must: str) -> None:
    """Check type, range and choices of every kind of key: the message has the key, the value and what it must be."""
    for value in values:
        with pytest.raises(UserError) as error:
            _read(**{key: value})
        assert str(error.value) == f"MODEL.TOY.{key} is {value!r}; it must be {must}."
    assert next(k.words for k in keys_of(Toy) if k.name == key) == must


def test_values_that_do_not_go_together() -> None:
    with pytest.raises(UserError, match=r"^MODEL\.TOY\.COUNT is 13, which FLAG does not like\.$"):
        _read(COUNT=13)
    assert _read(COUNT=13, FLAG=False).count == 13


def test_what_is_no_statement_of_keys() -> None:
    """Check a class that is not a dataclass, a type that configs do not support, and a key without a default."""

    class Plain(Keys):
        size: int = 1

    @dataclass(frozen=True)
    class Strange(Keys):
        table: dict = field(default_factory=dict)

    @dataclass(frozen=True)
    class Open(Keys):
        size: int

    with pytest.raises(TypeError, match=r"Plain lacks the decorator @dataclass\(frozen=True\)"):
        keys_of(Plain)
    with pytest.raises(TypeError, match=r"Strange.table is of type <class 'dict'>; a config key is a bool"):
        keys_of(Strange)
    with pytest.raises(TypeError, match=r"Open.size has no default"):
        keys_of(Open)


# --------------------------------------------------------------------------------------------------- methods


@dataclass(frozen=True)
class Formula(Keys):
    T: Annotated[float, Above(0), "Temperature."] = 4.0
    topK: int = 2


def test_fields_in_the_case_of_formulas() -> None:
    """Check the keys T and TOPK, and that two fields of one key are refused."""
    assert [key.name for key in keys_of(Formula)] == ["T", "TOPK"]
    assert _read(Formula, TOPK=3) == Formula(T=4.0, topK=3)
    with pytest.raises(UserError, match=r"^MODEL\.TOY\.T is 0\.0; it must be a number above 0\.$"):
        _read(Formula, T=0.0)
    with pytest.raises(UserError, match=r"^Formula\.T is -1\.0; it must be a number above 0\.$"):
        Formula(T=-1.0).validate("Formula")

    @dataclass(frozen=True)
    class Both(Formula):
        t: float = 1.0

    with pytest.raises(TypeError, match=r"Both has T and t, which are the same key T$"):
        keys_of(Both)


@pytest.fixture
def registered() -> Iterator[Callable[[type[Distiller]], type[Distiller]]]:
    """Return a decorator that registers a method for one test."""
    before = dict(DISTILLER_REGISTRY)
    yield DISTILLER_REGISTRY.register()
    for name in dict(DISTILLER_REGISTRY).keys() - before:
        del DISTILLER_REGISTRY._obj_map[name]


def _method(name: str, **attributes: object) -> type[Distiller]:
    return type(name, (Distiller,), {"needs": frozenset({"features"}), "loss_names": ("loss_x",), **attributes})


def test_a_method_that_is_defined_again_replaces_the_first(registered: Callable) -> None:
    """Check a cell of a notebook that runs twice; a class of that name in another module is refused."""
    registered(_method("Mine", CONFIG_NODE="MINE"))
    second = registered(_method("Mine", CONFIG_NODE="OTHER"))
    assert DISTILLER_REGISTRY.get("Mine") is second
    with pytest.raises(UserError, match="The methods Mine and Mine have the same CONFIG_NODE"):
        registered(_method("Mine", CONFIG_NODE="OTHER", __module__="elsewhere"))


def test_two_methods_with_one_node_are_refused(registered: Callable) -> None:
    """Check a method with the node of another one, one that inherits its node, and one without a node."""
    with pytest.raises(
        UserError, match=r"^The methods CWD and Mine have the same CONFIG_NODE 'CWD': rename one of them\.$"
    ):
        registered(_method("Mine", CONFIG_NODE="CWD"))
    first = registered(_method("First", CONFIG_NODE="OWN"))
    with pytest.raises(UserError, match=r"^The methods First and Second have the same CONFIG_NODE 'OWN'"):
        registered(type("Second", (first,), {}))
    with pytest.raises(UserError, match=r"^The method Third has no CONFIG_NODE"):
        registered(_method("Third"))
    assert {"First"} == dict(DISTILLER_REGISTRY).keys() & {"Mine", "First", "Second", "Third"}


@pytest.mark.parametrize("node", ["", "MY.NODE", "my node"])
def test_a_node_that_is_no_word_is_refused(registered: Callable, node: str) -> None:
    with pytest.raises(UserError, match=rf"^The method Mine has the CONFIG_NODE {node!r}, which is not one word"):
        registered(_method("Mine", CONFIG_NODE=node))


def test_a_name_of_another_method_is_refused(registered: Callable) -> None:
    with pytest.raises(
        UserError,
        match=r"^There are two methods with the name CWD, of kd_d2\.distillers\.cwd and of mine: rename one of them\.$",
    ):
        registered(_method("CWD", CONFIG_NODE="MINE", __module__="mine"))


def test_a_class_that_is_no_method_is_refused(registered: Callable) -> None:
    with pytest.raises(UserError, match=r"^The method Mine is not derived from kd_d2\.distillers\.Distiller\.$"):
        registered(type("Mine", (), {"CONFIG_NODE": "MINE"}))


def test_a_config_without_the_keys_of_all_methods_is_refused() -> None:
    with pytest.raises(UserError, match=r"^The Config of the method Mine is not derived from Distiller\.Config, which"):
        _method("Mine", Config=dataclass(frozen=True)(type("Config", (), {})))


def test_a_state_that_cannot_be_loaded_is_refused() -> None:
    """Check a method that would save a state without reading it, and one that reads the state of its base class."""
    with pytest.raises(UserError, match=r"^The method Mine defines get_extra_state without set_extra_state, so that"):
        _method("Mine", get_extra_state=dict)
    first = _method("First", get_extra_state=dict, set_extra_state=lambda self, state: None)
    type("Second", (first,), {"get_extra_state": dict})


def test_a_node_of_the_library_is_refused(registered: Callable, tiny_cfg: Callable) -> None:
    registered(_method("Mine", CONFIG_NODE="TEACHER"))
    with pytest.raises(UserError, match=r"^The method Mine has the CONFIG_NODE 'TEACHER', which is a key of MODEL\.KD"):
        tiny_cfg("retinanet")


@pytest.mark.parametrize("old", ["add_config", "validate_config", "from_config", "default_weight"])
def test_a_method_written_for_an_older_version_is_refused(old: str) -> None:
    """Check that the message names the obsolete function and its replacement."""
    with pytest.raises(
        UserError, match=rf"^The method Mine defines {old}, .* a dataclass `Config\(Distiller\.Config\)`"
    ):
        _method("Mine", **{old: classmethod(lambda cls, *arguments: None)})


def test_a_method_whose_config_is_no_dataclass_is_refused() -> None:
    with pytest.raises(TypeError, match=r"Config lacks the decorator"):
        _method("Mine", Config=type("Config", (Distiller.Config,), {"size": 3}))


def test_the_reference_has_every_key_with_its_description(tiny_cfg: Callable) -> None:
    """Check that the reference has all keys of the library and of every method, each with a description."""
    entries = {entry.name: entry for entry in config_reference()}
    assert len(entries) == len(config_reference())

    def keys_below(node: CfgNode, path: str) -> Iterator[str]:
        for name, value in node.items():
            if isinstance(value, CfgNode):
                yield from keys_below(value, f"{path}.{name}")
            else:
                yield f"{path}.{name}"

    cfg = tiny_cfg("retinanet")
    assert {name for name in entries if name.startswith("MODEL.KD.")} == set(keys_below(cfg.MODEL.KD, "MODEL.KD"))
    for name in MODELING_KEYS:
        of_node = {key for key in entries if key.startswith(f"MODEL.{name}.")}
        assert of_node == set(keys_below(cfg.MODEL[name], f"MODEL.{name}"))
    assert {"DATASETS.COCO_JSON", "SOLVER.AMP.DTYPE", "MODEL.KD.ICD.WARMUP_ITERS"} <= entries.keys()
    undescribed = [name for name, entry in entries.items() if not entry.description.endswith(".") or not entry.values]
    assert undescribed == []
    dim = entries["MODEL.KD.ICD.DIM"]
    assert (dim.values, dim.default) == ("a whole number at least 1", 256)
