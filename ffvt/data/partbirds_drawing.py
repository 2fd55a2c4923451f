"""Drawing a PartBirds picture: ground, bird, marks, in numpy alone.

Only + - * / and sqrt are used, which IEEE 754 rounds alike everywhere, so a seed gives the same bytes anywhere.
"""

from dataclasses import dataclass, field, fields
from functools import cache

import numpy as np

Point = tuple[float, float]
Colour = tuple[float, float, float]
Box = tuple[int, int, int, int]

FAMILIES: dict[str, Colour] = {
    "amber": (238, 160, 48),
    "teal": (30, 148, 146),
    "crimson": (208, 58, 66),
    "violet": (128, 88, 182),
    "moss": (122, 146, 48),
    "azure": (66, 132, 214),
}
# A mark is inked where its field is lowest; x and y run over one quadrant, 0 at the centre and 1 at the rim.
# Fields of |x| and |y| make every mark its own mirror image, so mirroring a bird can never turn one into another.
MARKS = {
    "ring": lambda x, y: abs(np.sqrt(x * x + y * y) - 0.8),
    "bars": lambda x, y: abs(y - 0.6) + x / 64,
    "cross": lambda x, y: abs(x - y) + (x + y) / 64,
    "pales": lambda x, y: abs(x - 0.6) + y / 64,
    "disc": lambda x, y: x * x + y * y,
    "plus": lambda x, y: np.minimum(x, y) + np.maximum(x, y) / 8,
    "dots": lambda x, y: np.square(x - 0.64) + np.square(y - 0.64),
    "hourglass": lambda x, y: x - y + y / 64,
}
_PLATE, _INK = (252, 246, 228), (24, 28, 52)
_SKIES = (
    ((204, 226, 234), (246, 234, 206)),
    ((216, 230, 206), (178, 204, 184)),
    ((246, 222, 198), (222, 188, 176)),
    ((226, 222, 238), (188, 196, 222)),
    ((240, 236, 220), (206, 196, 170)),
)
_LEAVES = ((84, 122, 88), (112, 138, 84), (70, 108, 104), (140, 128, 78), (96, 112, 122))
_BARKS = ((104, 80, 66), (124, 98, 80), (92, 84, 84))
_WHITE, _BLACK, _DUSK = (255, 255, 255), (0, 0, 0), (20, 20, 50)

# The bird from back to front, in body units: x forward, y down, the origin in the middle of the body. A stroke has a
# tint, two ends and a radius at each; an ellipse has a tint, a centre, two radii and the direction of the first.
_SLANT = (0.9659258, -0.258819)
_ANATOMY = (
    ("stroke", "leg", (0.02, 0.26), (0.00, 0.55), 0.028, 0.022),
    ("stroke", "leg", (0.16, 0.26), (0.17, 0.55), 0.028, 0.022),
    ("stroke", "tail", (-0.30, 0.06), (-0.84, 0.10), 0.05, 0.055),
    ("stroke", "tail", (-0.30, 0.10), (-0.86, 0.21), 0.05, 0.06),
    ("stroke", "beak", (0.53, -0.28), (0.74, -0.235), 0.085, 0.012),
    ("ellipse", "body", (0.00, 0.04), (0.47, 0.345), _SLANT),
    ("stroke", "body", (0.08, -0.02), (0.36, -0.28), 0.29, 0.245),
    ("ellipse", "belly", (0.24, 0.20), (0.30, 0.22), (0.8660254, -0.5)),
    ("ellipse", "cheek", (0.40, -0.17), (0.075, 0.06), (1.0, 0.0)),
    ("stroke", "tail", (-0.20, 0.10), (-0.50, 0.23), 0.15, 0.04),
    ("ellipse", "wing", (-0.08, 0.03), (0.385, 0.285), _SLANT),
    ("ellipse", "white", (0.42, -0.32), (0.088, 0.088), (1.0, 0.0)),
    ("ellipse", "pupil", (0.435, -0.32), (0.06, 0.06), (1.0, 0.0)),
    ("ellipse", "white", (0.455, -0.345), (0.02, 0.02), (1.0, 0.0)),
)
_REACH = (0.94, 0.78, 0.56, 0.62)  # behind, ahead, above and below the origin
_MARK_AT = (-0.06, 0.03)
_MARK_ROOM = 0.42  # side of the upright square that fits the wing at any tilt
_TILT = 0.08  # the largest rotation, as the tangent of half its angle
_SPREAD = 0.05  # how far a bird's size strays from the usual, as a share


def _bounded(default: float, low: float, high: float):
    return field(default=default, metadata={"limits": (low, high)})


@dataclass(frozen=True)
class PartBirdsConfig:
    """What the birds of one set look like and how many there are.

    `image_size` is the side in pixels; `families` and `varieties` count the classes of each kind; `mark_size` is the
    side of a mark, in pixels and even; `distractors` counts the stray marks, each of another variety and none of the
    true one; `clutter` goes from 0 (bare) to 1 (dense); `bird` is the body unit as a share of the side; `wander`, in
    0..1, is how much of the room around it a bird may use. Raises ValueError for what cannot be drawn.
    """

    image_size: int = _bounded(64, 32, 1024)
    families: int = _bounded(4, 1, len(FAMILIES))
    varieties: int = _bounded(4, 1, len(MARKS))
    mark_size: int = _bounded(12, 8, 512)
    distractors: int = _bounded(2, 0, len(MARKS) - 1)
    clutter: float = _bounded(0.5, 0, 1)
    train_size: int = _bounded(4000, 1, 10**9)
    test_size: int = _bounded(800, 1, 10**9)
    bird: float = _bounded(0.48, 0.2, 0.55)
    wander: float = _bounded(0.8, 0, 1)

    def __post_init__(self) -> None:
        for item in fields(self):
            value, (low, high) = getattr(self, item.name), item.metadata["limits"]
            if type(value) not in (int, item.type) or not low <= value <= high:
                raise ValueError(f"{item.name} must be {item.type.__name__} in {low}..{high}, got {value!r}")
        if self.distractors >= self.varieties:
            raise ValueError(f"distractors must be fewer than the {self.varieties} varieties, got {self.distractors}")
        room = int(_MARK_ROOM * self.bird * (1 - _SPREAD) * self.image_size)
        if self.mark_size % 2 or self.mark_size > room:
            raise ValueError(f"mark_size must be even and at most {room} to fit the wing, got {self.mark_size}")


class _Layer:
    """A premultiplied RGBA raster, float32 (4, S, S) in 0..255, painted back to front; pixel centres lie at +0.5."""

    def __init__(self, size: int):
        self.pixels = np.zeros((4, size, size), np.float32)
        self._axis = np.arange(size, dtype=np.float32) + np.float32(0.5)

    def blob(self, centre: Point, radius: float, colour: Colour, opacity: float) -> None:
        """Tint a roundish patch that fades from the centre outwards."""
        columns, rows, x, y = self._window(centre, centre, radius)
        x, y = (np.maximum(1 - np.square(axis / radius), 0) for axis in (x, y))
        self._paint(columns, rows, np.square(x) * (np.square(y) * opacity), colour)

    def ellipse(self, centre: Point, radii: Point, axis: Point, colour: Colour, inside: bool = False) -> None:
        """Fill an ellipse whose first radius runs along `axis`; `inside` keeps to what is already painted."""
        columns, rows, x, y = self._window(centre, centre, max(radii))
        (a, b), (dx, dy) = radii, axis
        along = np.square(x * (dx / a) + y * (dy / a))
        across = np.square(y * (dx / b) - x * (dy / b))
        # Distance to the rim to first order: the field's value over its slope, which is right where it shows.
        slope = np.sqrt(along * (4 / (a * a)) + across * (4 / (b * b)) + 1e-9)
        cover = _unit((1 - along - across) / slope + 0.5)
        self._paint(columns, rows, cover * (self.pixels[3, rows, columns] / 255) if inside else cover, colour)

    def stroke(self, start: Point, end: Point, start_radius: float, end_radius: float, colour: Colour) -> None:
        """Fill a round-ended stroke whose radius goes evenly from one to the other."""
        columns, rows, x, y = self._window(start, end, max(start_radius, end_radius))
        dx, dy = end[0] - start[0], end[1] - start[1]
        length = dx * dx + dy * dy
        share = _unit(x * (dx / length) + y * (dy / length))
        distance = np.sqrt(np.square(x - share * dx) + np.square(y - share * dy))
        self._paint(columns, rows, _unit(share * (end_radius - start_radius) + (start_radius + 0.5) - distance), colour)

    def _window(self, start: Point, end: Point, reach: float) -> tuple[slice, slice, np.ndarray, np.ndarray]:
        """Columns and rows a shape can touch, counted from `start`: small windows are most of the speed."""
        (x0, y0), (x1, y1) = start, end
        columns = slice(max(int(min(x0, x1) - reach - 1), 0), max(int(max(x0, x1) + reach + 2), 0))
        rows = slice(max(int(min(y0, y1) - reach - 1), 0), max(int(max(y0, y1) + reach + 2), 0))
        return columns, rows, self._axis[columns] - x0, (self._axis[rows] - y0)[:, None]

    def _paint(self, columns: slice, rows: slice, cover: np.ndarray, colour: Colour) -> None:
        area = self.pixels[:, rows, columns]
        area += cover * (_opaque(colour) - area)


@dataclass(frozen=True)
class _Pose:
    """Where the bird sits: body units to pixels by scale, tilt and mirror (`facing` is 1 or -1)."""

    origin: Point
    scale: float
    axis: Point
    facing: int

    def turn(self, u: float, v: float) -> Point:
        cos, sin = self.axis
        return self.facing * (u * cos - v * sin), u * sin + v * cos

    def at(self, u: float, v: float) -> Point:
        (x, y), (dx, dy) = self.origin, self.turn(u, v)
        return x + self.scale * dx, y + self.scale * dy


@dataclass(frozen=True)
class Scene:
    """A picture short of its marks, uint8 (3, S, S); the box of the true one; boxes and varieties of the stray ones."""

    canvas: np.ndarray
    bird: np.ndarray
    box: Box
    strays: tuple[tuple[Box, int], ...]


def _unit(values: np.ndarray) -> np.ndarray:
    return np.minimum(np.maximum(values, 0), 1)  # np.clip costs several times as much on arrays this small


def _opaque(colour: Colour) -> np.ndarray:
    return np.array((*colour, 255), np.float32)[:, None, None]


def _mix(colour: Colour, other: Colour, share: float) -> Colour:
    return tuple(a + (b - a) * share for a, b in zip(colour, other))


def _between(rng: np.random.Generator, low: float, high: float) -> float:
    return low + (high - low) * rng.random()


def _pick(rng: np.random.Generator, options):
    return options[int(len(options) * rng.random())]


def _axis(half_tangent: float) -> Point:
    """Unit vector by the rational circle, for want of a sine that is the same everywhere."""
    square = half_tangent * half_tangent
    return (1 - square) / (1 + square), 2 * half_tangent / (1 + square)


def _pose(config: PartBirdsConfig, rng: np.random.Generator) -> _Pose:
    scale = config.image_size * config.bird * _between(rng, 1 - _SPREAD, 1 + _SPREAD)
    facing = _pick(rng, (-1, 1))
    behind, ahead, above, below = (scale * reach for reach in _REACH)
    origin = []
    for near, far in ((behind, ahead)[::facing], (above, below)):
        slack = config.wander * (config.image_size - near - far)
        origin.append((config.image_size + near - far + slack * _between(rng, -1, 1)) / 2)
    return _Pose(tuple(origin), scale, _axis(_between(rng, -_TILT, _TILT)), facing)


def _paint_ground(layer: _Layer, config: PartBirdsConfig, pose: _Pose, rng: np.random.Generator) -> None:
    """Sky, soft blobs, twigs with leaves, and the branch the bird sits on."""
    size, unit = config.image_size, config.image_size / 64
    (near, far), (dx, dy) = _pick(rng, _SKIES)[:: _pick(rng, (-1, 1))], _axis(_between(rng, -1, 1))
    ramp = (np.arange(size, dtype=np.float32) + np.float32(0.5)) / size - np.float32(0.5)
    layer.pixels[:] = _opaque(near) + (_opaque(far) - _opaque(near)) * _unit(
        0.5 + 0.7 * (ramp * dx + ramp[:, None] * dy)
    )

    def anywhere() -> Point:
        return _between(rng, 0, size), _between(rng, 0, size)

    for _ in range(3 + round(5 * config.clutter)):
        colour = _mix(_pick(rng, _pick(rng, _SKIES)), _pick(rng, (_WHITE, _LEAVES[-1])), 0.4)
        layer.blob(anywhere(), _between(rng, 0.15, 0.35) * size, colour, _between(rng, 0.3, 0.8))
    for _ in range(round(4 * config.clutter)):
        start, end = anywhere(), anywhere()
        layer.stroke(start, end, 1.3 * unit, 0.5 * unit, _mix(_pick(rng, _BARKS), near, 0.5))
        for share in (0.4, 0.9):
            length, colour = _between(rng, 2.5, 4.5) * unit, _mix(_pick(rng, _LEAVES), near, 0.35)
            layer.ellipse(_mix(start, end, share), (length, 0.45 * length), _axis(_between(rng, -1, 1)), colour)
    slope = _between(rng, -0.06, 0.06)
    layer.stroke(pose.at(-4, 0.6 - 4 * slope), pose.at(4, 0.6 + 4 * slope), 1.5 * unit, 2.1 * unit, _pick(rng, _BARKS))
    for u in (_between(rng, -0.75, -0.5), _between(rng, 0.5, 0.75)):
        radii, axis = (0.15 * pose.scale, 0.065 * pose.scale), pose.turn(_pick(rng, (0.8, -0.8)), 0.6)
        layer.ellipse(pose.at(u, 0.68 + u * slope), radii, axis, _pick(rng, _LEAVES))


def _paint_bird(layer: _Layer, pose: _Pose, body: Colour) -> None:
    tints = {"body": body, "wing": _mix(body, _DUSK, 0.32), "tail": _mix(body, _DUSK, 0.45)}
    tints |= {"belly": _mix(body, (255, 246, 226), 0.6), "cheek": _mix(body, (255, 120, 110), 0.6)}
    tints |= {"leg": (96, 66, 52), "beak": (244, 138, 40), "white": _WHITE, "pupil": (26, 24, 38)}
    for kind, tint, start, second, third, *fourth in _ANATOMY:
        if kind == "stroke":
            radii = third * pose.scale, fourth[0] * pose.scale
            layer.stroke(pose.at(*start), pose.at(*second), *radii, tints[tint])
        else:
            radii = second[0] * pose.scale, second[1] * pose.scale
            layer.ellipse(pose.at(*start), radii, pose.turn(*third), tints[tint], tint in ("belly", "cheek"))


def _free_place(taken: np.ndarray, side: int, rng: np.random.Generator) -> tuple[int, int] | None:
    """Top left corner (x, y) of a random side x side square in which the mask `taken` is False, if there is one."""
    sums = np.zeros((len(taken) + 1, len(taken) + 1), np.int32)
    np.cumsum(taken.cumsum(0, dtype=np.int32), 1, out=sums[1:, 1:])
    counts = sums[side:, side:] - sums[:-side, side:] - sums[side:, :-side] + sums[:-side, :-side]
    free = np.flatnonzero(counts == 0)
    return divmod(int(_pick(rng, free)), len(counts))[::-1] if len(free) else None


def draw_scene(config: PartBirdsConfig, rng: np.random.Generator, family: int, variety: int) -> Scene:
    """Draw all but the marks; nothing but which varieties the stray marks are of depends on `variety`."""
    size, mark = config.image_size, config.mark_size
    pose, ground, bird = _pose(config, rng), _Layer(size), _Layer(size)
    _paint_ground(ground, config, pose, rng)
    body = _mix(tuple(FAMILIES.values())[family], _pick(rng, (_WHITE, _BLACK)), _between(rng, 0, 0.08))
    _paint_bird(bird, pose, tuple(channel + _between(rng, -8, 8) for channel in body))
    x, y = (int((centre * 2 - mark + 1) / 2) for centre in pose.at(*_MARK_AT))
    box, alpha = (x, y, x + mark, y + mark), bird.pixels[3]
    taken = alpha > 0
    taken[y : y + mark, x : x + mark] = True
    strays, others = [], [other for other in range(config.varieties) if other != variety]
    for _ in range(config.distractors):
        place = _free_place(taken, mark + 2, rng)
        if place is None:
            raise ValueError(f"no room beside the bird for {config.distractors} distractors of {mark} pixels")
        x, y = place[0] + 1, place[1] + 1
        taken[y - 1 : y + mark + 1, x - 1 : x + mark + 1] = True
        strays.append(((x, y, x + mark, y + mark), others.pop(int(len(others) * rng.random()))))
        middle, axis, colour = (x + mark / 2, y + mark / 2), _axis(_between(rng, -1, 1)), _pick(rng, _LEAVES)
        ground.ellipse(middle, (0.82 * mark, 0.66 * mark), axis, colour)
    grain = rng.integers(-128, 128, (size, size), np.int8) * np.float32((2 + 6 * config.clutter) / 128)
    canvas = bird.pixels[:3] + ground.pixels[:3] * (1 - alpha / 255) + grain
    return Scene(np.clip(canvas + 0.5, 0, 255).astype(np.uint8), alpha > 0, box, tuple(strays))


@cache
def _mark(variety: int, side: int) -> np.ndarray:
    """Pixels of a mark, int32 (3, side, side): a figure on a plate, the same pixel values for every variety."""
    half = side // 2 - 1
    axis = (np.arange(half) + 0.5) / half
    depth = tuple(MARKS.values())[variety](axis, axis[:, None])
    # Inking a fixed number of the lowest pixels is what makes all marks rearrangements of one another.
    inked = np.zeros(half * half, bool)
    inked[np.argsort(depth, axis=None, kind="stable")[: round(0.4 * half) * half]] = True
    right = np.concatenate([inked.reshape(half, half)[::-1], inked.reshape(half, half)])
    figure = np.pad(np.concatenate([right[:, ::-1], right], axis=1), 1)
    return np.where(figure, _opaque(_INK), _opaque(_PLATE))[:3].astype(np.int32)


@cache
def _plate_cover(side: int) -> np.ndarray:
    """Opacity of a mark's plate, whose corners are round: int32 (side, side) in 0..256."""
    reach = np.square(np.maximum(abs(np.arange(side) + 0.5 - side / 2) - (side / 2 - 2.5), 0))
    return (256 * _unit(3 - np.sqrt(reach + reach[:, None]))).astype(np.int32)


def put_marks(scene: Scene, variety: int) -> np.ndarray:
    """Put the marks on a scene: uint8 (3, S, S)."""
    image = scene.canvas.copy()
    for (x0, y0, x1, y1), mark in (*scene.strays, (scene.box, variety)):
        area, cover = image[:, y0:y1, x0:x1], _plate_cover(x1 - x0)
        area[:] = (area * (256 - cover) + _mark(mark, x1 - x0) * cover) >> 8
    return image
