"""Product photos of the demo catalogue: one drawn shape with a colour and a pattern, never twice the same."""

from io import BytesIO

import numpy as np
from PIL import Image, ImageDraw

SIZE = 64  # pixels of a side
FINE = 2 * SIZE  # drawn twice as large and shrunk, so that edges are smooth
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLOURS = {
    "red": (214, 39, 40),
    "orange": (255, 140, 26),
    "yellow": (240, 222, 40),
    "green": (40, 150, 60),
    "blue": (35, 80, 200),
    "purple": (125, 55, 160),
    "pink": (250, 130, 190),
    "black": (35, 35, 35),
}
PATTERNS = ("plain", "striped", "dotted", "checked", "halved")
CONTRASTS = ("vivid", "faded")  # a vivid product has a white outline and a strong pattern


def draw_photo(shape: str, colour: str, pattern: str, contrast: str, rng: np.random.Generator) -> bytes:
    """A JPEG; place, size, rotation, shade, background and grain come from `rng`."""
    centre = FINE / 2 + rng.uniform(-0.1, 0.1, 2) * FINE
    radius, turn = rng.uniform(0.3, 0.38) * FINE, rng.uniform(-0.35, 0.35)
    vivid = contrast == "vivid"
    body = _mask(shape, centre, radius, turn, hole=0.5)
    inked = body & _pattern(pattern, centre, turn + rng.uniform(-0.4, 0.4), rng.uniform(13, 17))
    outer = _shrunk(_mask(shape, centre, radius + 7, turn, hole=0.44) if vivid else body)
    inner, ink = _shrunk(body), _shrunk(inked)
    ground = rng.uniform(120, 190) + rng.uniform(-8, 8, 3)
    paint = np.clip(np.array(COLOURS[colour]) * rng.uniform(0.9, 1.08), 0, 255)
    inky = paint + (0.75 if vivid else 0.5) * ((200 if colour == "black" else 0) - paint)
    parts = zip((1 - outer, outer - inner, inner - ink, ink), (ground, 255.0, paint, inky), strict=True)
    pixels = sum(cover * np.asarray(value, np.float32) for cover, value in parts)
    pixels += 4 * rng.standard_normal((SIZE, SIZE, 3), np.float32)
    buffer = BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90, subsampling=0)
    return buffer.getvalue()


def _shrunk(mask: np.ndarray) -> np.ndarray:
    """The share of each pixel that the mask covers: (SIZE, SIZE, 1)."""
    fine = mask.astype(np.float32)
    return (fine[::2] + fine[1::2]).reshape(SIZE, SIZE, 2).sum(2, keepdims=True) / 4


def _mask(shape: str, centre: np.ndarray, radius: float, turn: float, hole: float) -> np.ndarray:
    """The pixels that the shape covers; a ring's hole is that share of its radius."""
    canvas = Image.new("1", (FINE, FINE))
    draw = ImageDraw.Draw(canvas)
    if shape in ("circle", "ring"):
        draw.ellipse([*(centre - radius), *(centre + radius)], fill=1)
        if shape == "ring":
            draw.ellipse([*(centre - hole * radius), *(centre + hole * radius)], fill=0)
    else:
        x, y = radius * _outline(shape)
        corners = centre[:, None] + np.stack([x * np.cos(turn) - y * np.sin(turn), x * np.sin(turn) + y * np.cos(turn)])
        draw.polygon([(px, py) for px, py in corners.T.tolist()], fill=1)
    return np.asarray(canvas)


def _outline(shape: str) -> np.ndarray:
    """x and y of the corners, around 0, at most about 1 away."""
    if shape == "cross":
        arm = 0.34
        x = [-arm, arm, arm, 1, 1, arm, arm, -arm, -arm, -1, -1, -arm]
        return np.array([x, x[3:] + x[:3]])
    corners, first = {"square": (4, np.pi / 4), "triangle": (3, -np.pi / 2), "star": (10, -np.pi / 2)}[shape]
    angles = first + 2 * np.pi * np.arange(corners) / corners
    away = np.where(np.arange(corners) % 2, 0.45, 1.1) if shape == "star" else np.full(corners, 1.1)
    return away * np.stack([np.cos(angles), np.sin(angles)])


def _pattern(pattern: str, centre: np.ndarray, turn: float, period: float) -> np.ndarray:
    """Where the ink is, on the whole canvas."""
    x, y = np.arange(FINE) - centre[0], np.arange(FINE)[:, None] - centre[1]
    cos, sin = np.cos(turn) / period, np.sin(turn) / period
    u, v = x * cos + y * sin, y * cos - x * sin
    if pattern == "striped":
        return np.floor(2 * u) % 2 == 0
    if pattern == "checked":
        return (np.floor(u) + np.floor(v)) % 2 == 0
    if pattern == "dotted":
        return (u % 1 - 0.5) ** 2 + (v % 1 - 0.5) ** 2 < 0.08
    return u > 0 if pattern == "halved" else np.zeros_like(u, dtype=bool)
