"""The normal chest of the phantom: bones, lungs, heart, vessels and the five organ regions.

Coordinates are patient mm (z, y, x) = (towards the feet, towards the back, towards the patient's left); see
phantom_canvas. The shape of a chest is a handful of analytic surfaces, so it can be asked at single points as well as
on any grid, and the same patient can be drawn at any resolution.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from hirescam_jax.data.phantom_canvas import Canvas, Patch, Pose, ellipsoid_distance, smooth_path

REGIONS = ("right_lung", "left_lung", "heart", "great_vessels", "mediastinum")
Tube = tuple[np.ndarray, np.ndarray]  # points [N, 3] mm, radii [N] mm

# Inner surface of the rib cage: half-width, depth in front and depth behind the origin, at some heights.
_HEIGHTS = np.array([-150, -130, -105, -80, -45, 0, 45, 85, 120, 150], float)
_CAGE_SIDE = np.array([52, 64, 84, 100, 114, 121, 124, 125, 123, 118], float)
_CAGE_FRONT = np.array([36, 44, 56, 66, 78, 88, 93, 92, 87, 83], float)
_CAGE_BACK = np.array([58, 68, 80, 87, 92, 93, 90, 85, 79, 75], float)
# Outer surface of the muscles.
_BODY_SIDE = np.array([120, 136, 144, 146, 144, 141, 140, 140, 139, 137], float)
_BODY_FRONT = np.array([58, 68, 80, 90, 100, 107, 110, 109, 106, 104], float)
_BODY_BACK = np.array([96, 108, 117, 121, 122, 121, 117, 111, 105, 101], float)
_CAGE_POWER, _BODY_POWER = 2.3, 2.5
RIB_PITCH = 23.0


def _axes(long, hint) -> np.ndarray:
    """Right-angled unit rows: along `long`, along the part of `hint` across it, and across both."""
    first = np.asarray(long, float) / np.linalg.norm(long)
    second = np.asarray(hint, float) - first * (first @ np.asarray(hint, float))
    second /= np.linalg.norm(second)
    return np.stack([first, second, np.cross(first, second)])


HEART_AXES = _axes((0.46, -0.50, 0.73), (0.6, 0.8, 0.1))  # base to apex: down, forwards and left
HEART_BASE = np.array([22.0, -10.0, 4.0])  # the heart grows about this point


@dataclasses.dataclass(frozen=True)
class Patient:
    """Everything about a normal chest that differs between people; drawn by `draw_patient`."""

    pose: Pose
    female: bool
    fat_mm: float
    mediastinal_fat: float  # mm by which the mediastinum is wider
    lung_hu: float
    contrast_hu: float  # enhancement of blood, 0 without contrast medium
    bone_hu: float
    heart_scale: float
    diaphragm_mm: float  # higher is a deeper breath
    rib_phase: float
    age: float  # 0 young .. 1 old: calcified cartilage, unfolded aorta
    noise_hu: float
    noise_grain: float
    gas: float  # how much air the stomach holds, 0..1
    vessels: int  # seed of the vascular trees


def draw_patient(rng: np.random.Generator) -> Patient:
    """Draw one normal chest."""
    u = rng.uniform
    return Patient(
        pose=Pose(
            u(0.93, 1.05), np.deg2rad(u(-5, 5)), (u(-6, 6), u(-8, 4), u(-7, 7))
        ),
        female=bool(rng.random() < 0.5),
        fat_mm=float(6 + 26 * rng.beta(1.5, 2.2)),
        mediastinal_fat=u(0, 5),
        lung_hu=u(-875, -825),
        contrast_hu=float(max(0.0, u(-60, 150))),
        bone_hu=u(-60, 80),
        heart_scale=u(0.88, 1.02),
        diaphragm_mm=u(-12, 10),
        rib_phase=u(0, RIB_PITCH),
        age=u(0, 1),
        noise_hu=u(9, 22),
        noise_grain=u(0.35, 0.8),
        gas=u(0, 1),
        vessels=int(rng.integers(2**31)),
    )


class Anatomy:
    """The surfaces of one chest. Methods named *_mm give signed distances (negative inside) and broadcast z, y, x."""

    def __init__(
        self,
        patient: Patient,
        heart_growth: float = 1.0,
        fluid_mm: float = 0.0,
        aorta_widening: tuple[float, float] = (0.0, 0.0),
    ):
        self.patient = p = patient
        self.heart_scale = p.heart_scale * heart_growth
        self.fluid_mm = fluid_mm
        self.sac_mm = 4.0 + fluid_mm  # epicardial fat, then fluid
        self.great_vessels = self._great_vessels(aorta_widening)

    # -- surfaces ------------------------------------------------------------------------------

    @staticmethod
    def _profile(z, y, x, side, front, back, power, grow=(0.0, 0.0, 0.0)):
        """First-order distance to a lofted superellipse with separate depths in front and behind."""
        a, f, b = (np.interp(z, _HEIGHTS, t).astype(np.float32) + g for t, g in zip((side, front, back), grow, strict=True))
        ax, ay = np.abs(x) ** power, np.abs(y) ** power
        front_y, back_y = np.where(y < 0, ay, 0), np.where(y < 0, 0, ay)
        level = ax * a**-power + front_y * f**-power + back_y * b**-power
        # |gradient| of level ** (1/2) at level 1, from the direction alone with mid-chest radii
        depth = np.where(y < 0, np.interp(0, _HEIGHTS, front), np.interp(0, _HEIGHTS, back)).astype(np.float32)
        width = np.float32(np.interp(0, _HEIGHTS, side))
        rx, ry = np.abs(x) / width, np.abs(y) / depth
        unit = np.maximum(rx**power + ry**power, 1e-6) ** (-1 / power)
        slope = np.hypot((rx * unit) ** (power - 1) / width, (ry * unit) ** (power - 1) / depth) * (power / 2)
        return (np.sqrt(level) - 1) / slope

    def cage_mm(self, z, y, x):
        """Inner surface of the rib cage."""
        return self._profile(z, y, x, _CAGE_SIDE, _CAGE_FRONT, _CAGE_BACK, _CAGE_POWER)

    def body_mm(self, z, y, x):
        """The skin of the trunk, without breasts and arms."""
        fat = self.patient.fat_mm
        grow = (fat, 0.75 * fat, 0.7 * fat)
        return self._profile(z, y, x, _BODY_SIDE, _BODY_FRONT, _BODY_BACK, _BODY_POWER, grow)

    def breasts(self) -> list[tuple[tuple[float, float, float], tuple[float, float, float]]]:
        """Centres and radii of the two breasts of a woman, lying on her back."""
        if not self.patient.female:
            return []
        fat = self.patient.fat_mm
        return [((14, -88 - 0.75 * fat, 66 * side), (46, 24 + 0.6 * fat, 52)) for side in (-1, 1)]

    def skin_y(self, z, x) -> np.ndarray:
        """y of the skin in front, mm, at points z, x [N]."""
        y = np.arange(-190.0, 1.0)
        z, x = np.asarray(z, float)[:, None], np.asarray(x, float)[:, None]
        body = self.body_mm(z, y, x)
        for centre, radii in self.breasts():
            body = np.minimum(body, ellipsoid_distance(z, y, x, centre, radii))
        return y[np.argmax(body < 0, axis=1)]

    def diaphragm_z(self, y, x):
        """Height of the dome, mm: the lung ends there; it falls steeply to the costophrenic angles."""
        blend = np.clip((x + 25) / 50, 0, 1)
        lateral = np.maximum(np.abs(x) - 58, 0) / 60
        medial = np.minimum(np.abs(x) - 58, 0) / 60
        back, front = np.maximum(y + 5, 0) / 85, np.minimum(y + 5, 0) / 85
        dome = 64 + self.patient.diaphragm_mm + 7 * blend
        return dome + 40 * lateral**2 + 9 * medial**2 + 52 * back**2 + 26 * front**2

    def apex_z(self, y, x):
        """Height of the lungs' tops, mm."""
        return -134 + 38 * ((np.abs(x) - 50) / 55) ** 2 + 42 * ((y - 12) / 66) ** 2

    def core_mm(self, z, y, x):
        """The mediastinum without its organs, and the spine: a septum between the lungs, thin in front."""
        base = np.interp(z, [-150, -125, -100, -60, -20, 40, 80, 150], [44, 38, 29, 26, 27, 25, 28, 30])
        base = base.astype(np.float32) + self.patient.mediastinal_fat
        thin = np.clip((y + 62) / 50, 0, 1)
        shape = 0.3 + 0.7 * thin * thin * (3 - 2 * thin)
        return np.abs(x - 2) - base * shape

    def heart_mm(self, z, y, x):
        """Outside of the muscle: ventricles and atria, smoothly joined."""
        s = self.heart_scale
        lower = ellipsoid_distance(z, y, x, self.heart_point((36, -26, 20)), (s * 56, s * 41, s * 40), HEART_AXES)
        upper = ellipsoid_distance(z, y, x, self.heart_point((12, -2, -10)), (s * 36, s * 35, s * 37))
        mix = np.clip(0.5 + (upper - lower) / 24, 0, 1)
        return upper + (lower - upper) * mix - 12 * mix * (1 - mix)

    def heart_point(self, point):
        """A point of the standard heart, mm -> the same point of this heart."""
        return HEART_BASE + (np.asarray(point, float) - HEART_BASE) * self.heart_scale

    def lung_mm(self, z, y, x):
        """Hemithorax before the organs of the mediastinum are taken out (both sides; x < 0 is the right one)."""
        dome = 0.75 * np.maximum(z - self.diaphragm_z(y, x), self.apex_z(y, x) - z)
        return np.maximum(np.maximum(self.cage_mm(z, y, x), dome), -self.core_mm(z, y, x))

    def free_lung_mm(self, z, y, x):
        """Hemithorax with the heart taken out: where a lesion may be put (points, not grids)."""
        return np.maximum(self.lung_mm(z, y, x), self.sac_mm - self.heart_mm(z, y, x))

    # -- vessels and airways -------------------------------------------------------------------

    def _great_vessels(self, widening: tuple[float, float]) -> dict[str, Tube]:
        up, down = widening
        lift = 4 * self.patient.age
        s = self.heart_point
        ascending = [(*s((12, -16, 6)), 14.5), (-18, -30, -9, 15.5 + up), (-46, -27, -13, 14.5 + 0.8 * up)]
        arch = [(-68 - lift, -10, -2, 13.5 + 0.3 * up), (-70 - lift, 16, 17 + lift, 12.5 + 0.5 * down)]
        descending = [(-46, 40, 25 + lift, 12 + down), (0, 47, 25 + lift, 11.8 + down), (60, 45, 20, 11.5 + 0.6 * down), (155, 40, 8, 11)]
        trunk = [(*s((2, -44, 14)), 13.5), (-22, -30, 22, 13.5), (-32, -10, 24, 12.5)]
        right = [(-28, -20, 18, 11), (-27, 2, -8, 10.5), (-22, 10, -30, 9.5), (-12, 20, -46, 7.5)]
        left = [(-34, -4, 26, 11), (-38, 14, 38, 10), (-28, 24, 48, 8), (-12, 26, 52, 6.5)]
        cava = [(-98, -22, -27, 8), (-60, -20, -29, 8.5), (-20, -16, -31, 9), (*s((4, -12, -30)), 9)]
        paths = {"aorta": ascending + arch + descending, "trunk": trunk, "right": right, "left": left, "cava": cava}
        return {name: _tube(rows) for name, rows in paths.items()}

    def other_vessels(self) -> list[Tube]:
        """Branches of the arch, brachiocephalic vein, azygos and inferior caval vein: they belong to no vessel region."""
        lift = 4 * self.patient.age
        top = -78 - lift
        return [
            _tube([(top, -10, -5, 6), (-112, -6, -18, 5.5), (-155, -4, -30, 5)]),
            _tube([(top, 0, 4, 4), (-112, 2, 14, 4), (-155, 0, 24, 3.5)]),
            _tube([(top, 10, 12, 4.5), (-112, 14, 26, 4.5), (-135, 4, 48, 4.5), (-128, -5, 85, 4)]),
            _tube([(-112, -34, 46, 5.5), (-100, -36, 14, 6), (-92, -26, -22, 6.5)]),
            _tube([(-120, -20, -40, 5.5), (-95, -22, -28, 7)]),
            _tube([(-44, 28, -18, 4), (-38, 46, -9, 3.5), (30, 48, -6, 3), (120, 42, -3, 3)]),
            _tube([(*self.heart_point((40, 2, -24)), 11.5), (72, 8, -28, 12), (150, 16, -26, 12)]),
        ]

    def airways(self) -> list[Tube]:
        """Lumen of the trachea and of the bronchi down to the lobes."""
        trachea = [(-155, 6, 0, 8.5), (-112, 19, -1, 8.5), (-70, 29, -2, 8.5), (-38, 34, -1, 9)]
        return [
            _tube(trachea),
            _tube([(-40, 34, -4, 7.5), (-26, 33, -20, 7), (-12, 31, -38, 6), (10, 32, -46, 4.5), (34, 40, -52, 3.2)]),
            _tube([(-40, 34, 2, 7), (-22, 36, 22, 6.5), (-6, 36, 42, 5.5), (14, 38, 50, 4), (38, 44, 56, 3)]),
            _tube([(-22, 32, -26, 4.5), (-32, 30, -46, 4), (-48, 26, -58, 2.8)]),
            _tube([(-10, 36, 38, 4.2), (-22, 30, 52, 3.4), (-40, 24, 60, 2.6)]),
            _tube([(2, 30, -44, 3.4), (10, 12, -58, 2.6), (16, -8, -66, 2.0)]),
            _tube([(-12, 32, 48, 3.2), (-2, 10, 62, 2.6), (6, -8, 72, 2.0)]),
        ]

    def oesophagus(self) -> Tube:
        return _tube([(-155, 26, 4, 6), (-80, 43, 6, 6.5), (-30, 47, 4, 6.5), (30, 36, 5, 7), (75, 22, 14, 8), (105, 10, 34, 9)])

    def lung_vessels(self, spacing: float, thinnest: float) -> Tube:
        """Arterial and venous trees of both lungs as balls `spacing` mm apart, branches under `thinnest` mm left out."""
        rng = np.random.default_rng(self.patient.vessels)
        points, radii = [], []
        for side in (-1, 1):
            for root, aims, radius, length, turns in (
                ((-14, 22, 46 * side), _ARTERY_AIMS, 4.6, 27.0, 7),
                ((4, 16, 40 * side), _VEIN_AIMS, 4.0, 27.0, 6),
            ):
                directions = np.array(aims, float) * (1, 1, side)
                _grow(rng, np.array(root, float), directions, radius, length, turns, spacing, thinnest, points, radii)
        return np.concatenate(points), np.concatenate(radii)


_ARTERY_AIMS = [(-1, -0.25, 0.35), (-0.8, 0.5, 0.5), (-0.25, -0.8, 0.75), (0.1, 0.25, 1), (0.75, -0.45, 0.7), (1, 0.35, 0.35), (0.6, 0.8, 0.45)]
_VEIN_AIMS = [(-0.7, -0.7, 0.5), (-0.5, 0.3, 1), (0.3, -0.6, 1), (0.9, 0.0, 0.7), (0.6, 0.7, 0.7)]


def _tube(rows) -> Tube:
    rows = np.asarray(rows, float)
    return smooth_path(rows[:, :3], rows[:, 3], spacing=max(1.0, float(rows[:, 3].min()) / 2.5))


def _grow(rng, root, directions, radius, length, generations, spacing, thinnest, points, radii) -> None:
    """Bifurcating tree, a generation at a time; the random draws do not depend on spacing or thinnest."""
    heads = np.repeat(root[None], len(directions), 0)
    directions = directions / np.linalg.norm(directions, axis=1, keepdims=True)
    radius = np.full(len(heads), radius)
    for _ in range(generations):
        reach = length * rng.uniform(0.7, 1.25, (len(heads), 1))
        tails = heads + directions * reach
        count = int(np.ceil(length * 1.25 / max(spacing, radius.max() / 2)))
        kept = radius > thinnest
        t = (np.arange(count) / count)[None, :, None]
        bow = rng.normal(0, 0.06, (len(heads), 1, 3)) * reach[:, None] * (4 * t * (1 - t))
        line = heads[:, None] + t * (tails - heads)[:, None] + bow
        points.append(line[kept].reshape(-1, 3))
        radii.append(np.repeat(radius[kept], count))
        normal = np.cross(directions, rng.normal(size=directions.shape))
        normal /= np.linalg.norm(normal, axis=1, keepdims=True) + 1e-9
        turn = np.deg2rad(rng.uniform([12, 30], [32, 60], (len(heads), 2)))
        children = [
            np.cos(turn[:, :1]) * directions + np.sin(turn[:, :1]) * normal,
            np.cos(turn[:, 1:]) * directions - np.sin(turn[:, 1:]) * normal,
        ]
        directions = np.concatenate(children)
        heads = np.concatenate([tails, tails])
        radius = np.concatenate([0.84 * radius, 0.68 * radius])
        length *= 0.84


@dataclasses.dataclass
class Scene:
    """One slab with the normal chest drawn, and the coverages that the findings need."""

    canvas: Canvas
    anatomy: Anatomy
    lung: np.ndarray  # float32 [n, H, W] coverage of both hemithoraces
    cage: np.ndarray  # float32 [n, H, W] mm, signed distance to the inner surface of the rib cage
    lung_depth: np.ndarray  # float32 [n, H, W] mm from the chest wall, mediastinum and diaphragm, positive inside
    heart: Patch | None  # pericardial sac
    myocardium_mm: np.ndarray | None  # distance to the heart's surface in heart.where
    labels: np.ndarray  # uint8 [n, H, W], 0 elsewhere, 1 + place in REGIONS


def draw_chest(canvas: Canvas, anatomy: Anatomy, arms_down: bool, bulges: list[Tube]) -> Scene:
    """Draw the normal chest; `bulges` are masses that widen the mediastinum and push the lungs aside."""
    c, a, p = canvas, anatomy, anatomy.patient
    z, y, x = c.z, c.y, c.x
    cage = a.cage_mm(z, y, x)
    whole = (slice(None), slice(None), slice(None))

    _draw_wall(c, a, cage, arms_down)
    inner = c.cover(cage)
    c.paint(Patch(whole, inner), -95)

    below = 0.75 * (a.diaphragm_z(y, x) - z)  # negative under the dome
    _draw_abdomen(c, a, np.maximum(below + 3, cage))
    c.paint(Patch(whole, c.cover(np.abs(below + 1.5) - 1.5) * inner), 40)  # the muscle of the diaphragm

    apex = 0.75 * (a.apex_z(y, x) - z)
    core = a.core_mm(z, y, x)
    depth = -np.maximum(np.maximum(cage, -core), np.maximum(-below, apex))
    lung = c.cover(-depth)
    organs = np.zeros(c.shape, np.float32)
    vessels = {name: c.tube(*tube) for name, tube in a.great_vessels.items()}
    for name, tube in a.great_vessels.items():
        _stack(organs, c.tube(*tube, widen=1.5))
    for tube in bulges + a.airways()[:3]:
        _stack(organs, c.tube(*tube, widen=1.5))
    s = a.heart_scale
    box = c.box(a.heart_point((30, -18, 12)), (s * 70 + a.fluid_mm + 6, s * 62 + a.fluid_mm + 6, s * 74 + a.fluid_mm + 6))
    heart = distance = None
    if box is not None:
        distance = a.heart_mm(*c.coordinates(box))
        sac = np.maximum(np.maximum(distance - a.sac_mm, -below[box]), cage[box] + 3)
        heart = Patch(box, c.cover(sac))
        _stack(organs, heart)
    lung *= 1 - organs
    c.paint(Patch(whole, lung), p.lung_hu + 0.3 * y + 0.12 * z)

    _draw_bones(c, a, cage)
    _draw_mediastinum(c, a, heart, distance, vessels)
    _draw_lung_tubes(c, a, lung, depth)

    labels = np.zeros(c.shape, np.uint8)
    spine = (y > 50) | ((y - 62) ** 2 + x**2 < 23**2)
    between = (inner > 0.5) & (below > 0) & ~spine & (z > -128) & (core < 40)
    labels[between & (lung <= 0.5)] = 5
    for patch in vessels.values():
        if patch is not None:
            labels[patch.where][(patch.alpha > 0.5) & (below[patch.where] > 0)] = 4
    if heart is not None:
        labels[heart.where][heart.alpha > 0.5] = 3
    labels[(lung > 0.5) & (x < 2)] = 1
    labels[(lung > 0.5) & (x >= 2)] = 2
    return Scene(c, a, lung, cage, depth, heart, distance, labels)


def _stack(total: np.ndarray, patch: Patch | None) -> None:
    if patch is not None:
        np.maximum(total[patch.where], patch.alpha, out=total[patch.where])


def _draw_wall(c: Canvas, a: Anatomy, cage: np.ndarray, arms_down: bool) -> None:
    """Skin, fat, muscles, breasts, arms, shoulder blades and collar bones."""
    p = a.patient
    fat = p.fat_mm
    body = a.body_mm(c.z, c.y, c.x)
    whole = (slice(None), slice(None), slice(None))
    skin = c.cover(body)
    flesh = c.cover(body + 2.2)
    arms = []
    for side in (-1, 1):
        if arms_down:
            line = [(-128, 22, 112, 40), (-95, 26, 150, 40), (-30, 26, 152 + fat, 40), (60, 24, 160 + fat, 37), (160, 14, 165 + fat, 33)]
        else:
            line = [(-100, 34, 112, 36), (-122, 26, 136, 44), (-150, 12, 158, 44), (-190, -5, 178, 40)]
        arms.append(_tube([(q[0], q[1], side * q[2], q[3]) for q in line]))
    for tube in arms:
        _stack(skin, c.tube(*tube, widen=0.4 * fat))
        _stack(flesh, c.tube(*tube, widen=0.4 * fat - 2.2))
    for centre, radii in a.breasts():
        _stack(skin, c.ellipsoid(centre, radii))
        _stack(flesh, c.ellipsoid(centre, np.subtract(radii, 2.2)))
    c.paint(Patch(whole, skin), 10)
    c.paint(Patch(whole, flesh), -105)
    for (_, y, x), (_, thick, _) in a.breasts():
        c.paint(c.ellipsoid((16, y - 6, x), (26, 0.6 * thick, 30), softness=12), 10, flesh)
    muscle = c.cover(np.maximum(cage - 12, body + 0.75 * fat))
    for side in (-1, 1):
        for centre, radii in (
            ((-55, -78, 66), (46, 15, 48)),  # pectoral
            ((-45, 52, 112), (80, 44, 22)),  # latissimus, serratus, subscapular
            ((-10, 101, 30), (170, 17, 27)),  # erector spinae
            ((-70, 98, 62), (70, 12, 50)),  # trapezius, infraspinatus
        ):
            patch = c.ellipsoid((centre[0], centre[1], side * centre[2]), radii)
            if patch is not None:
                _stack(muscle, Patch(patch.where, patch.alpha * c.cover(body[patch.where] + 0.7 * fat + 1)))
    c.paint(Patch(whole, muscle), 52)
    for tube in arms:
        c.paint(c.tube(*tube, widen=-6), 55, flesh)
    for side, tube in zip((-1, 1), arms, strict=True):
        bone = (tube[0], np.full(len(tube[0]), 11.5))
        c.paint(c.tube(*bone), 800 + p.bone_hu)
        c.paint(c.tube(*bone, widen=-4.5), 60)
        blade = c.ellipsoid((-50, 78, 92 * side), (66, 26, 44))
        if blade is not None:
            plate = np.abs(cage[blade.where] - 19) - 2.5
            c.paint(Patch(blade.where, blade.alpha * c.cover(plate)), 520 + p.bone_hu)
        collar = [(-92, -74, 20 * side, 7), (-108, -66, 55 * side, 6), (-120, -38, 96 * side, 6), (-126, -6, 124 * side, 6)]
        c.paint(c.tube(*_tube(collar)), 480 + p.bone_hu)
        c.paint(c.tube(*_tube(collar), widen=-2.2), 180)


def _draw_bones(c: Canvas, a: Anatomy, cage: np.ndarray) -> None:
    """Ribs with their cartilage, breast bone, spine."""
    p = a.patient
    z, y, x = c.z, c.y, c.x
    width = np.abs(x)
    front = np.clip((-y - 20) / 40, 0, 1)
    lift = 0.40 * y - 0.55 * np.maximum(62 - width, 0) * front  # ribs fall towards the front, cartilage rises again
    phase = (z + lift - p.rib_phase) / RIB_PITCH
    vertical = (phase - np.rint(phase)) * (0.9 * RIB_PITCH)
    oval = np.sqrt((vertical / 6.8) ** 2 + ((cage - 5.5) / 4.2) ** 2)
    margin = np.where(y < 0, 66 + 0.75 * width + 0.3 * (y + 90), 400)
    rows = (z < margin) & (z > a.apex_z(y, x) - 10) & ((width > 20) | (y < 0))
    alpha = c.cover((oval - 1) * 4.6) * rows
    cartilage = np.clip((62 - width) / 14, 0, 1) * front
    marrow = (190 + p.bone_hu) * (1 - cartilage) + (95 + 120 * p.age) * cartilage
    shell = (760 + p.bone_hu) * (1 - cartilage) + (110 + 260 * p.age) * cartilage
    c.paint(Patch((slice(None),) * 3, alpha), marrow + (shell - marrow) * np.minimum(oval, 1) ** 4)

    box = c.box((-12, -80, 0), (74, 50, 32))
    if box is not None:
        bz, _, bx = c.coordinates(box)
        half = np.interp(bz, [-84, -62, -50, 20, 50, 60], [27, 22, 15, 19, 12, 5]).astype(np.float32)
        oval = np.sqrt((bx / half) ** 2 + ((cage[box] - 7) / 6.5) ** 2)
        ends = np.maximum(-84 - bz, bz - 58)
        alpha = c.cover(np.maximum((oval - 1) * 6.5, ends)) * (c.y[:, box[1], box[2]] < 0)
        c.paint(Patch(box, alpha), 170 + p.bone_hu + 420 * np.minimum(oval, 1) ** 5)
    _draw_spine(c, a)


def _draw_spine(c: Canvas, a: Anatomy) -> None:
    p = a.patient
    box = c.box((0, 84, 0), (160, 46, 42))
    if box is None:
        return
    z, y, x = c.coordinates(box)
    y = y - (58 + 8 * np.exp(-((z + 30) / 70) ** 2)).astype(np.float32)  # kyphosis
    width = np.abs(x)
    phase = (z - p.rib_phase) / (RIB_PITCH + 2.5)
    level = (phase - np.rint(phase)) * (RIB_PITCH + 2.5)  # mm from the middle of a vertebra
    waist = 1.0 + 0.10 * (level / 12) ** 2
    body = np.sqrt((x / (16.5 * waist)) ** 2 + (y / (13.5 * waist)) ** 2)
    disc = c.cover(9.8 - np.abs(level))
    radial = (body - 1) * 14
    hu = 150 + p.bone_hu + 420 * np.minimum(body, 1) ** 8 + 250 * np.exp(-((np.abs(level) - 8.8) / 1.2) ** 2)
    block = lambda alpha, value: c.paint(Patch(box, alpha), value)  # noqa: E731
    # posterior elements first, then body, disc and canal over them
    ring = np.hypot(x, y - 24)
    lamina = np.maximum(np.abs(ring - 12.5) - 3.2, np.abs(level + 2) - 8)
    spinous = np.maximum(np.maximum(width - 3.4, np.abs(level - 0.35 * (y - 34) + 4) - 6), np.abs(y - 44) - 11)
    transverse = np.maximum(np.hypot(level + 5, y - 22 - 0.25 * width) - 4.6, np.abs(width - 22) - 13)
    block(c.cover(np.minimum(np.minimum(lamina, spinous), transverse)), 430 + p.bone_hu)
    block(c.cover(radial), hu)
    block(c.cover(radial) * disc, 75)
    block(c.cover(ring - 8.8), 25)
    block(c.cover(ring - 5), 40)


def _draw_abdomen(c: Canvas, a: Anatomy, below: np.ndarray) -> None:
    p = a.patient
    inside = c.cover(below)
    glow = 0.35 * p.contrast_hu
    c.paint(c.ellipsoid((118, -8, -52), (78, 86, 92)), 58 + glow, inside)
    c.paint(c.ellipsoid((92, -42, 22), (34, 40, 58)), 58 + glow, inside)
    c.paint(c.ellipsoid((112, 42, 86), (44, 36, 26)), 50 + glow, inside)
    stomach = c.ellipsoid((108, -26, 58), (40, 46, 44))
    c.paint(stomach, 25, inside)
    if stomach is not None:
        level = 30 - 60 * p.gas
        gas = c.ellipsoid((108, -26, 58), (36, 42, 40))
        if gas is not None:
            c.paint(Patch(gas.where, gas.alpha * c.cover(c.y[:, gas.where[1], gas.where[2]] + level)), -970, inside)
    c.paint(c.ellipsoid((140, -60, 20), (30, 24, 60)), -20, inside)
    for side in (-1, 1):
        c.paint(c.tube(*_tube([(80, 46, 9 * side, 6), (155, 46, 10 * side, 8)])), 50)


def _draw_mediastinum(c: Canvas, a: Anatomy, heart, distance, vessels) -> None:
    p = a.patient
    blood = 42 + p.contrast_hu
    c.paint(c.tube(*a.oesophagus()), 40)
    for tube in a.other_vessels():
        c.paint(c.tube(*tube), blood)
    if heart is not None:
        box = heart.where
        c.paint(heart, 45)
        rim = c.cover(np.abs(distance - a.sac_mm + 0.8) - 0.8)
        c.paint(Patch(box, heart.alpha), 8)  # fluid, or the layer that fat replaces next
        c.paint(Patch(box, heart.alpha * c.cover(distance - 4)), -85)
        c.paint(Patch(box, heart.alpha * rim), 35)
        muscle = heart.alpha * c.cover(distance)
        c.paint(Patch(box, muscle), 52 + 0.45 * p.contrast_hu)
        s = a.heart_scale
        within = np.zeros(c.shape, np.float32)
        within[box] = muscle * c.cover(distance + 3)
        for centre, radii, axes in (
            ((38, -18, 34), (s * 38, s * 18, s * 19), HEART_AXES),  # left ventricle
            ((38, -48, 8), (s * 36, s * 13, s * 26), HEART_AXES),  # right ventricle
            ((6, 18, 2), (s * 22, s * 14, s * 28), None),  # left atrium
            ((22, -10, -30), (s * 26, s * 22, s * 14), None),  # right atrium
        ):
            c.paint(c.ellipsoid(a.heart_point(centre), radii, axes), blood, within)
    for name, tube in a.great_vessels.items():
        c.paint(c.tube(*tube, widen=1.2), 45)
        c.paint(vessels[name], blood)


def _draw_lung_tubes(c: Canvas, a: Anatomy, lung: np.ndarray, depth: np.ndarray) -> None:
    blood = 30 + 0.8 * a.patient.contrast_hu
    fade = lung * np.clip((depth + 2) / 12, 0, 1)
    c.paint(c.tube(*a.lung_vessels(c.voxel / 2, 0.12 * c.voxel)), blood, fade)
    airways = a.airways()
    for tube in airways:
        c.paint(c.tube(*tube, widen=1.4), 20)
    for tube in airways:
        c.paint(c.tube(*tube), -980)
