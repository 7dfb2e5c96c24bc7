"""The twelve findings of the phantom: how they differ between patients, and how they are drawn.

A finding is described in patient mm before anything is drawn, whether the patient has it or not,
so that the same patient can be shown with and without it and on any grid.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from scipy import ndimage

from hirescam_jax.data.phantom.anatomy import REGIONS, SIDES, Anatomy, Patient
from hirescam_jax.data.phantom.canvas import Patch, Tube, curve, join
from hirescam_jax.data.phantom.chest import EVERYWHERE, Scene

LUNG_LABELS = (
    "nodule",
    "consolidation",
    "ground_glass",
    "emphysema",
    "fibrosis",
    "pleural_effusion",
)
PLACES = {  # the other findings, and the region of each
    "cardiomegaly": "heart",
    "coronary_calcification": "heart",
    "pacemaker": "heart",
    "pericardial_effusion": "heart",
    "aortic_aneurysm": "great_vessels",
    "lymphadenopathy": "mediastinum",
}
LABELS = LUNG_LABELS + tuple(PLACES)
_NODE_STATIONS = np.array(
    [
        (-66, 12, -24),
        (-50, 20, -24),
        (-30, -46, -12),
        (-20, 40, 2),
        (-14, 24, -54),
        (-10, 26, 58),
        (-54, -40, -20),
        (-52, -30, 30),
    ],
    float,
)


@dataclasses.dataclass(frozen=True)
class Findings:
    """How each finding looks in one patient; pairs are (right, left), tubes are clouds of balls."""

    nodule: tuple[Tube, Tube]
    consolidation: tuple[Tube, Tube]
    ground_glass: tuple[Tube, Tube]
    emphysema: tuple[Tube, Tube]
    fibrosis_mm: tuple[float, float]  # thickness of the band under the pleura
    effusion_mm: tuple[float, float]  # depth of the fluid at the back
    heart_growth: float
    pericardial_mm: float
    aorta_mm: tuple[float, float]  # growth of the radius: ascending, descending
    nodes: Tube
    plaques: np.ndarray  # [3, N] places along the three coronary arteries, 0 .. 1
    plaque_mm: np.ndarray  # [3, N] radii
    texture: int  # seed
    density: float  # 0 .. 1 within each finding's range of attenuation


def draw_findings(rng: np.random.Generator, patient: Patient) -> Findings:
    """Draw how each finding would look in this patient."""
    u, normal = rng.uniform, rng.normal
    growth, fluid = u(1.28, 1.50), u(9, 18)
    # lesions keep clear of the heart at its largest, and so fit whatever else is found
    room = Anatomy(patient, growth, fluid)
    tries = u((-125, -90, 12), (115, 88, 118), (700, 3))

    def pool(side: int) -> tuple[np.ndarray, np.ndarray]:
        points = tries * (1, 1, side)
        depth = -room.lung_mm(*points.T)
        return points[depth > 1], depth[depth > 1]

    lungs = pool(SIDES[0]), pool(SIDES[1])

    def pick(lung, count: int, depth: float, low: float = -130, high: float = 120) -> np.ndarray:
        """Points [count, 3] mm at least `depth` mm inside a lung, between two heights."""
        points, depths = lung
        good = points[(depths > depth) & (points[:, 0] > low) & (points[:, 0] < high)]
        return (good if len(good) else points)[rng.integers(max(len(good), 1), size=count)]

    def clump(centre: np.ndarray, count: int, spread, radii: tuple[float, float]) -> Tube:
        return centre + normal(size=(count, 3)) * spread, u(*radii, count)

    def nodule(lung, opacity: Tube) -> Tube:
        """One or two, where neither fluid nor the consolidation would hide them."""
        points, depths = lung
        seen = np.linalg.norm(points - opacity[0].mean(0), axis=1) > 50
        seen &= (points[:, 1] < 5) | (points[:, 0] < -80)
        if seen.any():
            lung = points[seen], depths[seen]
        balls = []
        for centre in pick(lung, 1 + int(rng.random() < 0.4), 13):
            radius = u(7.5, 15)
            bumps = normal(size=(8, 3))
            bumps *= 0.74 * radius / np.linalg.norm(bumps, axis=1, keepdims=True)
            balls += [(centre[None], np.array([0.88 * radius]))]
            balls += [(centre + bumps, u(0.22, 0.40, 8) * radius)]
        return join(balls)

    def consolidation(lung) -> Tube:
        centre = pick(lung, 1, 8, -70, 80)[0]
        return join(
            [clump(centre, 12, (15, 12, 11), (12, 20)), clump(centre, 30, (22, 18, 17), (4, 9))]
        )

    def ground_glass(lung) -> Tube:
        return join([clump(q, 16, (13, 13, 12), (5, 15)) for q in pick(lung, 4, 6)])

    def emphysema(lung) -> Tube:
        upper = pick(lung, 90, 2, -130, 5), u(5, 13, 90)
        return join([upper, (pick(lung, 40, 2, 0, 100), u(4, 9, 40))])

    dense = consolidation(lungs[0]), consolidation(lungs[1])
    stations = _NODE_STATIONS[rng.permutation(len(_NODE_STATIONS))[:5]]
    ascending = rng.random() < 0.65
    widening = u(10, 19)
    return Findings(
        nodule=(nodule(lungs[0], dense[0]), nodule(lungs[1], dense[1])),
        consolidation=dense,
        ground_glass=(ground_glass(lungs[0]), ground_glass(lungs[1])),
        emphysema=(emphysema(lungs[0]), emphysema(lungs[1])),
        fibrosis_mm=(u(13, 22), u(13, 22)),
        effusion_mm=(u(26, 60), u(26, 60)),
        heart_growth=growth,
        pericardial_mm=fluid,
        aorta_mm=(widening, 0.0) if ascending else (0.0, widening),
        nodes=join([clump(q, 3, (6, 4, 4), (8, 13)) for q in stations]),
        plaques=rng.random((3, 9)),
        plaque_mm=u(1.8, 3.3, (3, 9)),
        texture=int(rng.integers(2**31)),
        density=rng.random(),
    )


def change_anatomy(
    patient: Patient, findings: Findings, present: frozenset[str]
) -> tuple[Anatomy, list[Tube]]:
    """The anatomy with the findings that change organs, and the masses that push lungs aside."""
    anatomy = Anatomy(
        patient,
        findings.heart_growth if "cardiomegaly" in present else 1.0,
        findings.pericardial_mm if "pericardial_effusion" in present else 0.0,
        findings.aorta_mm if "aortic_aneurysm" in present else (0.0, 0.0),
    )
    return anatomy, [findings.nodes] if "lymphadenopathy" in present else []


class FindingsPainter:
    """Draws findings into a scene.

    Args:
      scene: the chest, drawn with the anatomy that `change_anatomy` gave.
      findings: how they look.
      lesions: bool [n, H, W] for every label, to be filled in; None where nobody asks.
    """

    def __init__(self, scene: Scene, findings: Findings, lesions: dict[str, np.ndarray] | None):
        self.scene, self.findings, self.lesions = scene, findings, lesions

    def draw(self, found: np.ndarray) -> None:
        """Draw what `found` [K, R] names, where it does."""
        in_lungs = {  # in this order: later ones lie over earlier ones
            "emphysema": self._emphysema,
            "ground_glass": self._ground_glass,
            "fibrosis": self._fibrosis,
            "consolidation": self._consolidation,
            "nodule": self._nodule,
            "pleural_effusion": self._pleural_effusion,
        }
        for label, paint in in_lungs.items():
            for side in np.flatnonzero(found[LABELS.index(label), :2]):
                paint(int(side))
        elsewhere = {
            "cardiomegaly": self._cardiomegaly,
            "pericardial_effusion": self._pericardial_effusion,
            "aortic_aneurysm": self._aortic_aneurysm,
            "lymphadenopathy": self._lymphadenopathy,
            "coronary_calcification": self._coronary_calcification,
            "pacemaker": self._pacemaker,
        }
        for label, paint in elsewhere.items():
            if found[LABELS.index(label)].any():
                paint()

    def _record(self, label: str, patch: Patch | None, region: str, least: float = 0.5) -> None:
        """The lesion is what the patch covers by more than `least` inside the region."""
        if self.lesions is not None and patch is not None:
            place = self.scene.labels[patch.where] == 1 + REGIONS.index(region)
            self.lesions[label][patch.where] |= (patch.alpha > least) & place

    # -- lungs -----------------------------------------------------------------------------------

    def _in_lung(self, label: str, patch: Patch | None, side: int) -> Patch | None:
        """The part of a patch inside one lung, recorded as a lesion."""
        if patch is None:
            return None
        x = self.scene.canvas.x[:, patch.where[1], patch.where[2]]
        half = x < 2 if side == 0 else x >= 2
        patch = Patch(patch.where, patch.alpha * self.scene.lung[patch.where] * half)
        self._record(label, patch, REGIONS[side])
        return patch

    def _replace_air(self, patch: Patch | None, hu: float) -> None:
        """Fill with something dense up to the pleura, leaving no seam of air along it."""
        if patch is not None:
            block = self.scene.canvas.hu[patch.where]
            filled = block + patch.alpha * (hu + 1000)
            np.minimum(filled, np.maximum(block, hu), out=block)

    def _cloud(self, label: str, balls: Tube, side: int, softness: float) -> Patch | None:
        return self._in_lung(label, self.scene.canvas.tube(balls, softness), side)

    def _nodule(self, side: int) -> None:
        patch = self._cloud("nodule", self.findings.nodule[side], side, 0.0)
        self._replace_air(patch, 30 + 40 * self.findings.density)

    def _consolidation(self, side: int) -> None:
        f, c = self.findings, self.scene.canvas
        patch = self._cloud("consolidation", f.consolidation[side], side, 5.0)
        self._replace_air(patch, 10 + 40 * f.density)
        if patch is not None:  # air still fills some bronchi, which run beside the vessels
            points, radii = self.scene.anatomy.lung_vessels(0.5 * c.voxel, 1.2)
            within = np.zeros(c.shape, np.float32)
            within[patch.where] = patch.alpha
            c.paint(c.tube((points + np.array([2, 4, 2]), 0.7 * radii)), -850, within)

    def _ground_glass(self, side: int) -> None:
        patch = self._cloud("ground_glass", self.findings.ground_glass[side], side, 12.0)
        if patch is not None:  # a veil, through which vessels are seen
            patch = Patch(patch.where, (0.32 + 0.16 * self.findings.density) * patch.alpha)
            self.scene.canvas.paint(patch, 0)

    def _emphysema(self, side: int) -> None:
        patch = self._cloud("emphysema", self.findings.emphysema[side], side, 3.0)
        self.scene.canvas.paint(patch, -985)

    def _fibrosis(self, side: int) -> None:
        c, f = self.scene.canvas, self.findings
        basal = np.clip((c.z + 85) / 90, 0, 1) * np.clip((c.y + 110) / 110, 0.35, 1)
        band = c.cover(-self.scene.lung_mm - f.fibrosis_mm[side] * basal, 5.0)
        band *= np.clip(3 * basal, 0, 1)
        patch = self._in_lung("fibrosis", Patch(EVERYWHERE, band), side)
        if patch is None:
            return
        c.paint(patch, -400 + 120 * f.density)
        if c.voxel < 4:  # honeycomb, which coarser grids cannot show
            voxels, *place = c.select(patch.alpha > 0.02)
            comb = np.tanh(2.5 * _rough(f.texture, np.stack(place) / 4.5))
            c.hu.reshape(-1)[voxels] += 240 * comb * patch.alpha.reshape(-1)[voxels]

    def _pleural_effusion(self, side: int) -> None:
        c, f = self.scene.canvas, self.findings
        rise = np.clip((c.z + 95) / 160, 0, 1)
        back = np.clip((c.y + 35) / 95, 0, 1)
        deep = f.effusion_mm[side] * rise * (back * back * (3 - 2 * back))
        patch = Patch(EVERYWHERE, c.cover(-self.scene.cage_mm - deep))
        patch = self._in_lung("pleural_effusion", patch, side)
        self._replace_air(patch, 4 + 14 * f.density)

    # -- heart, vessels, mediastinum -------------------------------------------------------------

    def _cardiomegaly(self) -> None:
        self._record("cardiomegaly", self.scene.heart, "heart")

    def _pericardial_effusion(self) -> None:
        heart = self.scene.heart
        if heart is not None:
            fat = self.scene.anatomy.patient.epicardial_fat_mm
            fluid = heart.alpha * self.scene.canvas.cover(fat - self.scene.heart_mm)
            self._record("pericardial_effusion", Patch(heart.where, fluid), "heart")

    def _aortic_aneurysm(self) -> None:
        points, radii = self.scene.anatomy.aorta
        usual = Anatomy(self.scene.anatomy.patient).aorta[1]
        wide = radii > usual + 4
        patch = self.scene.canvas.tube((points[wide], radii[wide]))
        self._record("aortic_aneurysm", patch, "great_vessels")

    def _lymphadenopathy(self) -> None:
        c = self.scene.canvas
        patch = c.tube(self.findings.nodes)
        if patch is not None:
            free = self.scene.labels[patch.where] == 1 + REGIONS.index("mediastinum")
            patch = Patch(patch.where, patch.alpha * free)
            c.paint(patch, 48 + 20 * self.findings.density)
            self._record("lymphadenopathy", patch, "mediastinum")

    def _coronary_calcification(self) -> None:
        c, f, heart = self.scene.canvas, self.findings, self.scene.heart
        if heart is None:
            return
        arteries = _coronary_arteries(self.scene.anatomy)
        points = [
            line[(some * len(line)).astype(int)]
            for line, some in zip(arteries, f.plaques, strict=True)
        ]
        patch = c.tube((np.concatenate(points), f.plaque_mm.reshape(-1)))
        c.paint(patch, 1000 + 600 * f.density)
        self._record("coronary_calcification", patch, "heart", 0.2)

    def _pacemaker(self) -> None:
        """A generator under the left collar bone; its lead goes through the veins to the heart."""
        c, a = self.scene.canvas, self.scene.anatomy
        y = float(a.skin_y([-72.0], [72.0])[0]) + 7 + 0.5 * a.patient.fat_mm
        c.paint(c.ellipsoid((-72, y, 72), (21, 6.5, 24)), 2600)
        veins = ((-88, y, 64), (-114, -36, 62), (-104, -36, 20), (-92, -26, -20), (-55, -20, -29))
        chambers = ((4, -12, -31), (20, -12, -32), (38, -26, -20), (52, -46, 0), (56, -52, 22))
        way = (*veins, *(a.heart_point(*q) for q in chambers))
        lead = c.tube(curve(*((z, y, x, 1.7) for z, y, x in way)))
        c.paint(lead, 3000)
        self._record("pacemaker", lead, "heart", 0.12)


def _coronary_arteries(anatomy: Anatomy) -> list[np.ndarray]:
    """Left anterior descending, circumflex and right coronary artery: points [N, 3], mm."""
    courses = (
        ((6, -34, 24), (20, -52, 38), (40, -62, 48), (58, -62, 58)),
        ((8, -22, 40), (20, -4, 56), (36, 8, 58)),
        ((8, -44, -14), (24, -48, -30), (46, -34, -34)),
    )
    centre = np.array(anatomy.heart_point(28, -16, 10))
    rays = np.linspace(0.4, 1.7, 80)[:, None]
    arteries = []
    for course in courses:
        line = curve(*((*anatomy.heart_point(*q), 1.0) for q in course))[0][::4]
        along = centre + rays * (line - centre)[:, None]  # out to the surface of the heart
        inside = anatomy.heart_mm(*np.moveaxis(along, -1, 0)) < 1.0
        last = len(rays) - 1 - np.argmax(inside[:, ::-1], axis=1)
        arteries.append(along[np.arange(len(line)), last])
    return arteries


def _rough(seed: int, points: np.ndarray) -> np.ndarray:
    """Smooth noise at points [3, N], in cells: mean 0, standard deviation about 1/2."""
    lattice = np.random.default_rng(seed).standard_normal((48, 48, 48), np.float32)
    return ndimage.map_coordinates(lattice, points, order=1, mode="grid-wrap")
