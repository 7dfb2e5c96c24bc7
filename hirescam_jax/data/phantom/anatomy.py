"""The normal chest of the phantom: its surfaces and vessels, and what differs between people.

Coordinates are patient mm (z, y, x) = (towards the feet, the back, the patient's left). A chest is
a handful of analytic surfaces, so it can be asked at single points as well as on any grid.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from hirescam_jax.data.phantom.canvas import Pose, Tube, curve, ellipsoid_distance, join

REGIONS = ("right_lung", "left_lung", "heart", "great_vessels", "mediastinum")
SIDES = (-1, 1)  # sign of x; right before left, like the lungs in REGIONS
RIB_PITCH = 24.5

_HEIGHTS = np.array([-150, -130, -105, -80, -45, 0, 45, 85, 120, 150], float)
_CAGE = np.array(  # inner surface of the ribs: half-width, depth in front, depth behind, mm
    [
        [52, 64, 84, 100, 114, 121, 124, 125, 123, 118],
        [36, 44, 56, 66, 78, 88, 93, 92, 87, 83],
        [58, 68, 80, 87, 92, 93, 90, 85, 79, 75],
    ],
    float,
)
_BODY = np.array(  # the same of the trunk without fat
    [
        [120, 136, 144, 146, 144, 141, 140, 140, 139, 137],
        [58, 68, 80, 90, 100, 107, 110, 109, 106, 104],
        [96, 108, 117, 121, 122, 121, 117, 111, 105, 101],
    ],
    float,
)
_HEART_CENTRE = np.array([22.0, -10.0, 4.0])  # the heart grows about this point
_ARTERY_AIMS = (
    (-1, -0.25, 0.35),
    (-0.8, 0.5, 0.5),
    (-0.25, -0.8, 0.75),
    (0.1, 0.25, 1),
    (0.75, -0.45, 0.7),
    (1, 0.35, 0.35),
    (0.6, 0.8, 0.45),
)
_VEIN_AIMS = ((-0.7, -0.7, 0.5), (-0.5, 0.3, 1), (0.3, -0.6, 1), (0.9, 0.0, 0.7), (0.6, 0.7, 0.7))


def _right_angled(first, second) -> np.ndarray:
    """Unit rows along `first`, along the part of `second` across it, and across both."""
    first = np.asarray(first, float) / np.linalg.norm(first)
    second = second - first * (first @ second)
    second /= np.linalg.norm(second)
    return np.stack([first, second, np.cross(first, second)])


HEART_AXES = _right_angled((0.46, -0.50, 0.73), np.array([0.6, 0.8, 0.1]))  # first: base to apex


@dataclasses.dataclass(frozen=True)
class Patient:
    """What differs between normal chests."""

    pose: Pose
    female: bool
    fat_mm: float  # under the skin
    mediastinal_fat_mm: float
    epicardial_fat_mm: float
    lung_hu: float
    contrast_hu: float  # how much brighter the blood is, 0 without contrast medium
    bone_hu: float
    heart_scale: float
    breath_mm: float  # how much lower the diaphragm stands
    rib_phase: float
    age: float  # 0 young .. 1 old: calcified cartilage, unfolded aorta
    gas: float  # how full of air the stomach is, 0 .. 1
    noise_hu: float
    noise_grain: float  # how alike neighbouring voxels' noise is, 0 .. 1
    vessels: int  # seed of the vascular trees


def draw_patient(rng: np.random.Generator) -> Patient:
    """Draw one normal chest."""
    u = rng.uniform
    return Patient(
        pose=Pose(u(0.93, 1.05), np.deg2rad(u(-5, 5)), (u(-6, 6), u(-8, 4), u(-7, 7))),
        female=rng.random() < 0.5,
        fat_mm=4 + 26 * rng.beta(1.4, 2.4),
        mediastinal_fat_mm=u(0, 5),
        epicardial_fat_mm=u(2.0, 5.5),
        lung_hu=u(-875, -825),
        contrast_hu=max(0.0, u(-60, 150)),
        bone_hu=u(-60, 80),
        heart_scale=u(0.88, 1.02),
        breath_mm=u(-12, 10),
        rib_phase=u(0, RIB_PITCH),
        age=u(0, 1),
        gas=u(0, 1),
        noise_hu=u(9, 22),
        noise_grain=u(0.35, 0.8),
        vessels=int(rng.integers(2**31)),
    )


class Anatomy:
    """Surfaces and vessels of one chest.

    Methods that end in _mm give signed distances to a surface, negative inside, exact at the
    surface to first order; they and the _z ones broadcast z, y, x in mm.

    Args:
      patient: the normal chest.
      heart_growth: factor on the size of the heart.
      fluid_mm: depth of fluid in the pericardium.
      aorta_mm: growth of the radius of the (ascending, descending) aorta.
    """

    def __init__(
        self,
        patient: Patient,
        heart_growth: float = 1.0,
        fluid_mm: float = 0.0,
        aorta_mm: tuple[float, float] = (0.0, 0.0),
    ):
        self.patient = patient
        self.heart_scale = patient.heart_scale * heart_growth
        self.sac_mm = patient.epicardial_fat_mm + fluid_mm  # from the heart to its pericardium
        self._aorta_mm = aorta_mm
        self._trees: dict[tuple[float, float], Tube] = {}

    # -- trunk, lungs and diaphragm --------------------------------------------------------------

    def cage_mm(self, z, y, x):
        """Inner surface of the rib cage."""
        return _loft(z, y, x, _CAGE, 2.3)

    def body_mm(self, z, y, x):
        """Skin of the trunk, without breasts and arms."""
        fat = self.patient.fat_mm
        return _loft(z, y, x, _BODY + np.array([[1.0], [0.75], [0.7]]) * fat, 2.5)

    def breasts(self) -> list[tuple[tuple[float, float, float], tuple[float, float, float]]]:
        """Centres and radii of a woman's breasts, as they lie on the chest of one on her back."""
        if not self.patient.female:
            return []
        fat = self.patient.fat_mm
        return [((14, -88 - 0.75 * fat, 66 * side), (48, 22 + 0.6 * fat, 54)) for side in SIDES]

    def skin_y(self, z, x) -> np.ndarray:
        """y of the skin in front, mm, at points z, x [N]."""
        y = np.arange(-190.0, 1.0)
        z, x = np.asarray(z, float)[:, None], np.asarray(x, float)[:, None]
        body = self.body_mm(z, y, x)
        for centre, radii in self.breasts():
            body = np.minimum(body, ellipsoid_distance(z, y, x, centre, radii))
        return y[np.argmax(body < 0, axis=1)]

    def diaphragm_z(self, y, x):
        """Height of the two domes, falling steeply to the costophrenic angles."""
        left = np.clip((x + 25) / 50, 0, 1)
        lateral, medial = np.maximum(np.abs(x) - 58, 0), np.minimum(np.abs(x) - 58, 0)
        back, front = np.maximum(y + 5, 0), np.minimum(y + 5, 0)
        dome = 64 + self.patient.breath_mm + 6 * left
        return (
            dome
            + 40 * (lateral / 60) ** 2
            + 8 * (medial / 60) ** 2
            + 52 * (back / 85) ** 2
            + 20 * (front / 85) ** 2
        )

    def above_diaphragm_mm(self, z, y, x):
        return 0.75 * (z - self.diaphragm_z(y, x))  # the domes slope: vertical mm are too many

    def apex_z(self, y, x):
        """Height of the tops of the lungs."""
        return -134 + 38 * ((np.abs(x) - 50) / 55) ** 2 + 42 * ((y - 12) / 66) ** 2

    def septum_mm(self, z, y, x):
        """What parts the lungs besides organs: a thin sheet in front, the spine behind."""
        middle = np.interp(
            z, [-150, -125, -100, -60, -20, 40, 80, 150], [40, 32, 22, 18, 16, 15, 20, 24]
        )
        middle = middle.astype(np.float32) + np.float32(self.patient.mediastinal_fat_mm)
        thin = _smoothstep((y + 66) / 55)
        behind = _smoothstep((y - 32) / 18)
        return np.abs(x - 2) - (4 + (middle - 4) * thin * (1 - behind) + 22 * behind)

    def hemithorax_mm(self, z, y, x):
        """Both lungs before the organs between them are taken out."""
        ends = np.maximum(self.above_diaphragm_mm(z, y, x), 0.75 * (self.apex_z(y, x) - z))
        sides = _smooth_max(self.cage_mm(z, y, x), -self.septum_mm(z, y, x), 10.0)
        return np.maximum(sides, ends)

    def lung_mm(self, z, y, x):
        """Both lungs beside the heart; near the hilum some of it is vessels."""
        heart = self.sac_mm - self.heart_mm(z, y, x)
        return np.maximum(self.hemithorax_mm(z, y, x), heart)

    # -- heart -----------------------------------------------------------------------------------

    def heart_point(self, z: float, y: float, x: float) -> tuple[float, float, float]:
        """A point of the standard heart -> the same point of this one, mm."""
        scaled = _HEART_CENTRE + (np.array([z, y, x]) - _HEART_CENTRE) * self.heart_scale
        return float(scaled[0]) + 0.7 * self.patient.breath_mm, float(scaled[1]), float(scaled[2])

    def heart_ellipsoid(self, centre, radii):
        """Centre and radii of a part of the standard heart -> of this one."""
        return self.heart_point(*centre), tuple(self.heart_scale * r for r in radii)

    def heart_mm(self, z, y, x):
        """Surface of the muscle: ventricles and atria, smoothly joined."""
        ventricles = self.heart_ellipsoid((42, -38, 20), (55, 42, 40))
        atria = self.heart_ellipsoid((24, -8, -9), (35, 36, 37))
        lower = ellipsoid_distance(z, y, x, *ventricles, HEART_AXES)
        upper = ellipsoid_distance(z, y, x, *atria)
        return -_smooth_max(-lower, -upper, 24.0)

    # -- vessels and airways ---------------------------------------------------------------------

    @functools.cached_property
    def aorta(self) -> Tube:
        up, down = self._aorta_mm
        lift = 4 * self.patient.age
        return curve(
            (*self.heart_point(14, -24, 8), 14),
            (-18, -32, -9, 15.5 + up),
            (-46, -28, -13, 14.5 + 0.8 * up),
            (-68 - lift, -10, -2, 13.5 + 0.3 * up),
            (-70 - lift, 16, 17 + lift, 12.5 + 0.5 * down),
            (-46, 40, 25 + lift, 12 + down),
            (0, 47, 25 + lift, 11.8 + down),
            (60, 45, 20, 11.5 + 0.6 * down),
            (155, 40, 8, 11),
        )

    @functools.cached_property
    def great_vessels(self) -> Tube:
        """Aorta, pulmonary trunk and its two arteries, superior caval vein: the blood inside."""
        h = self.heart_point
        cava = (-98, -22, -27, 8), (-60, -20, -29, 8.5), (-20, -18, -31, 9), (*h(8, -18, -30), 9)
        right = (-28, -20, 18, 11), (-27, 2, -8, 10.5), (-22, 10, -30, 9.5), (-12, 20, -46, 7)
        left = (-34, -8, 26, 11), (-38, 12, 38, 10), (-28, 24, 48, 8), (-12, 26, 52, 6.5)
        trunk = (*h(6, -54, 16), 13), (-20, -38, 22, 13.5), (-32, -14, 24, 12.5)
        return join([self.aorta, curve(*trunk), curve(*right), curve(*left), curve(*cava)])

    @functools.cached_property
    def other_vessels(self) -> Tube:
        """Branches of the arch, brachiocephalic, azygos and inferior caval veins: mediastinum."""
        top = -78 - 4 * self.patient.age
        return join(
            [
                curve((top, -10, -5, 6), (-112, -6, -18, 5.5), (-155, -4, -30, 5)),
                curve((top, 0, 4, 4), (-112, 2, 14, 4), (-155, 0, 24, 3.5)),
                curve(
                    (top, 10, 12, 4.5), (-112, 14, 26, 4.5), (-135, 4, 48, 4.5), (-128, -5, 85, 4)
                ),
                curve((-112, -34, 46, 5.5), (-100, -36, 14, 6), (-92, -26, -22, 6.5)),
                curve((-120, -20, -40, 5.5), (-95, -22, -28, 7)),
                curve((-44, 28, -18, 4), (-38, 46, -9, 3.5), (30, 48, -6, 3), (120, 42, -3, 3)),
                curve((*self.heart_point(40, 2, -24), 11.5), (72, 8, -28, 12), (150, 16, -26, 12)),
            ]
        )

    @functools.cached_property
    def main_airways(self) -> Tube:
        """Lumen of the trachea and the two main bronchi with what follows them down."""
        return join(
            [
                curve((-155, 6, 0, 8.5), (-112, 19, -1, 8.5), (-70, 29, -2, 8.5), (-38, 34, -1, 9)),
                curve((-40, 34, -4, 7.5), (-26, 33, -20, 7), (-12, 31, -38, 6), (10, 32, -46, 4.5)),
                curve((-40, 34, 2, 7), (-22, 36, 22, 6.5), (-6, 36, 42, 5.5), (14, 38, 50, 4)),
            ]
        )

    @functools.cached_property
    def bronchi(self) -> Tube:
        """Lumen of the bronchi of the lobes, inside the lungs."""
        return join(
            [
                curve((10, 32, -46, 4.3), (34, 40, -52, 3.2), (60, 48, -58, 2.2)),
                curve((14, 38, 50, 4), (38, 44, 56, 3), (64, 50, 62, 2.1)),
                curve(
                    (-22, 32, -26, 4.5), (-32, 30, -46, 4), (-48, 26, -58, 2.8), (-66, 20, -64, 2)
                ),
                curve(
                    (-10, 36, 38, 4.2), (-22, 30, 52, 3.4), (-40, 24, 60, 2.6), (-60, 16, 64, 1.9)
                ),
                curve(
                    (2, 30, -44, 3.4), (10, 12, -58, 2.6), (16, -10, -66, 2.0), (22, -30, -76, 1.5)
                ),
                curve((-12, 32, 48, 3.2), (-2, 10, 62, 2.6), (6, -10, 72, 2.0), (12, -30, 82, 1.5)),
            ]
        )

    @functools.cached_property
    def oesophagus(self) -> Tube:
        return curve(
            (-155, 26, 4, 6),
            (-80, 43, 6, 6.5),
            (-30, 47, 4, 6.5),
            (30, 36, 5, 7),
            (75, 22, 14, 8),
            (105, 10, 34, 9),
        )

    def lung_vessels(self, spacing: float, thinnest: float) -> Tube:
        """Arteries and veins of both lungs, points `spacing` mm apart, radii from `thinnest` mm."""
        if (spacing, thinnest) not in self._trees:
            rng = np.random.default_rng(self.patient.vessels)
            self._trees[spacing, thinnest] = _grow_trees(rng, spacing, thinnest)
        return self._trees[spacing, thinnest]


def _smoothstep(t):
    t = np.clip(t, 0, 1)
    return t * t * (3 - 2 * t)


def _smooth_max(a, b, width: float):
    """max(a, b), rounded where they differ by less than `width`."""
    mix = np.maximum(width - np.abs(a - b), 0)
    return np.maximum(a, b) + mix * mix * (0.25 / width)


def _loft(z, y, x, sizes: np.ndarray, power: float):
    """Distance to a stack of superellipses of `sizes` [side, front, back] at _HEIGHTS."""
    side, front, back = (np.interp(z, _HEIGHTS, row).astype(np.float32) for row in sizes)
    wide, deep = np.abs(x) ** power, np.abs(y) ** power
    level = wide * side**-power
    level = level + np.where(y < 0, deep, 0) * front**-power
    level += np.where(y < 0, 0, deep) * back**-power
    # the slope of sqrt(level) at the surface hardly depends on z: take it from mid-chest
    width, before, after = (np.float32(np.interp(0, _HEIGHTS, row)) for row in sizes)
    depth = np.where(y < 0, before, after)
    rx, ry = np.abs(x) / width, np.abs(y) / depth
    unit = np.maximum(rx**power + ry**power, 1e-6) ** (-1 / power)
    slope = np.hypot((rx * unit) ** (power - 1) / width, (ry * unit) ** (power - 1) / depth)
    level = np.sqrt(level, out=level)
    level -= 1
    level *= (2 / power) / slope
    return level


def _grow_trees(rng: np.random.Generator, spacing: float, thinnest: float) -> Tube:
    """Forking trees from the hila, a generation at a time; thin branches are left out.

    What is drawn from `rng` does not depend on `spacing` and `thinnest`.
    """
    aims = np.array([*_ARTERY_AIMS, *_VEIN_AIMS])
    artery = np.arange(len(aims)) < len(_ARTERY_AIMS)
    heads = np.where(artery[:, None], (-14.0, 22, 46), (4.0, 16, 40))
    heads = np.concatenate([heads * (1, 1, side) for side in SIDES])
    directions = np.concatenate([aims * (1, 1, side) for side in SIDES])
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    radii = np.tile(np.where(artery, 4.6, 4.2), 2)
    places = np.arange(len(heads))  # of the kept branches among all of their generation
    every, length, branches = len(heads), 25.0, []
    for _ in range(8):
        spans = rng.uniform(0.7, 1.3, every)[places, None]
        bends = rng.normal(0, 0.07, (every, 3))[places]
        across = np.cross(directions, rng.normal(size=(every, 3))[places])
        angles = np.deg2rad(rng.uniform((10, 30), (28, 62), (every, 2)))[places]
        across /= np.linalg.norm(across, axis=1, keepdims=True) + 1e-9
        reach = directions * (length * spans)
        count = int(np.ceil(1.1 * length / max(spacing, 0.4 * radii.max(initial=0))))
        t = (np.arange(count) / count)[:, None]
        line = heads[:, None] + t * reach[:, None] + (4 * length * t * (1 - t)) * bends[:, None]
        branches.append((line.reshape(-1, 3), np.repeat(radii, count)))
        cos, sin = np.cos(angles), np.sin(angles)
        straight = cos[:, :1] * directions + sin[:, :1] * across
        aside = cos[:, 1:] * directions - sin[:, 1:] * across
        directions = np.concatenate([straight, aside])
        heads = np.tile(heads + reach, (2, 1))
        radii = np.concatenate([0.80 * radii, 0.62 * radii])
        places = np.concatenate([places, places + every])
        every, length = 2 * every, 0.85 * length
        kept = radii > thinnest
        directions, heads, radii, places = directions[kept], heads[kept], radii[kept], places[kept]
    return join(branches)
