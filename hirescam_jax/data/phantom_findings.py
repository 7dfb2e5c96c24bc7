"""The twelve findings of the phantom: how they are drawn at random and how they change the chest.

A finding is described in patient mm before anything is drawn, present or not, so that the same patient can be shown
with and without it and at any resolution.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from hirescam_jax.data.phantom_anatomy import Anatomy, Patient, Scene, Tube
from hirescam_jax.data.phantom_canvas import Patch, smooth_path

LUNG_LABELS = (
    "nodule",
    "consolidation",
    "ground_glass",
    "emphysema",
    "fibrosis",
    "pleural_effusion",
)
PLACES = {  # the other findings and the region that holds them
    "cardiomegaly": "heart",
    "coronary_calcification": "heart",
    "pacemaker": "heart",
    "pericardial_effusion": "heart",
    "aortic_aneurysm": "great_vessels",
    "lymphadenopathy": "mediastinum",
}
LABELS = LUNG_LABELS + tuple(PLACES)
SIDES = (-1, 1)  # right, left: the sign of x, and the order of the two lungs in REGIONS


@dataclasses.dataclass(frozen=True)
class Cloud:
    """Overlapping balls: points [N, 3] mm and radii [N] mm."""

    points: np.ndarray
    radii: np.ndarray


@dataclasses.dataclass(frozen=True)
class Findings:
    """One patient's findings as they would look; pairs hold (right, left)."""

    nodule: tuple[Cloud, Cloud]
    consolidation: tuple[Cloud, Cloud]
    ground_glass: tuple[Cloud, Cloud]
    emphysema: tuple[Cloud, Cloud]
    fibrosis_mm: tuple[float, float]  # thickness of the subpleural band
    effusion_mm: tuple[float, float]  # depth of the fluid at the back
    heart_growth: float
    pericardial_mm: float
    aorta_widening: tuple[float, float]  # mm: ascending, descending
    nodes: Cloud
    calcified: tuple[np.ndarray, np.ndarray]  # share along, and radius of, the plaques of the coronary arteries
    density: float  # 0..1 within each finding's range of attenuation


def draw_findings(rng: np.random.Generator, patient: Patient) -> Findings:
    """Draw what each finding would look like in this patient."""
    u = rng.uniform
    growth = u(1.25, 1.48)
    room = Anatomy(patient, heart_growth=growth, fluid_mm=10.0)  # lesions fit whatever else is found

    def lung_points(side: int, count: int, depth: float, low: float = -115, high: float = 110):
        """`count` points [count, 3] at least `depth` mm inside the lung, between two heights."""
        tries = u((low, -85, 14), (high, 85, 118), (60 * count + 200, 3)) * (1, 1, side)
        inside = tries[room.free_lung_mm(*tries.T) < -depth]
        return np.resize(inside, (count, 3)) if len(inside) else np.tile((-20.0, 0, 70 * side), (count, 1))

    def clump(centre: np.ndarray, count: int, spread, radii: tuple[float, float]) -> Cloud:
        return Cloud(centre + rng.normal(size=(count, 3)) * spread, u(*radii, count))

    def nodule(side: int) -> Cloud:
        clouds = []
        for centre in lung_points(side, int(rng.integers(1, 3)), 12):
            radius = u(7.5, 15)
            bumps = rng.normal(size=(7, 3))
            bumps *= 0.72 * radius / np.linalg.norm(bumps, axis=1, keepdims=True)
            clouds.append(Cloud(np.vstack([centre[None], centre + bumps]), np.r_[0.88 * radius, u(0.25, 0.42, 7) * radius]))
        return _join(clouds)

    def consolidation(side: int) -> Cloud:
        centre = lung_points(side, 1, 10, -60, 80)[0]
        return clump(centre, 16, (16, 13, 12), (11, 21))

    def ground_glass(side: int) -> Cloud:
        return _join([clump(q, 7, (12, 12, 11), (10, 18)) for q in lung_points(side, 5, 6)])

    def emphysema(side: int) -> Cloud:
        top = Cloud(lung_points(side, 70, 2, -125, 0), u(6, 14, 70))
        return _join([top, Cloud(lung_points(side, 30, 2, 0, 90), u(4, 10, 30))])

    def nodes() -> Cloud:
        stations = np.array([(-66, 12, -24), (-52, 24, -20), (-26, -42, -4), (-22, 38, 2), (-14, 24, -52), (-10, 26, 56), (-52, -38, -18), (-48, -22, 30)])
        chosen = stations[rng.choice(len(stations), 5, replace=False)]
        return _join([clump(q, 3, (6, 4, 4), (8, 13)) for q in chosen.astype(float)])

    where = rng.random() < 0.65
    plaques = rng.random(26)
    return Findings(
        nodule=(nodule(-1), nodule(1)),
        consolidation=(consolidation(-1), consolidation(1)),
        ground_glass=(ground_glass(-1), ground_glass(1)),
        emphysema=(emphysema(-1), emphysema(1)),
        fibrosis_mm=(u(13, 22), u(13, 22)),
        effusion_mm=(u(24, 58), u(24, 58)),
        heart_growth=growth,
        pericardial_mm=u(9, 18),
        aorta_widening=(u(10, 19), 0.0) if where else (0.0, u(10, 19)),
        nodes=nodes(),
        calcified=(plaques, u(1.7, 3.2, 26)),
        density=rng.random(),
    )


def _join(clouds: list[Cloud]) -> Cloud:
    return Cloud(np.concatenate([c.points for c in clouds]), np.concatenate([c.radii for c in clouds]))


def change_anatomy(patient: Patient, findings: Findings, present: frozenset[str]) -> tuple[Anatomy, list[Tube]]:
    """The anatomy with the findings that change organs, and the masses that push the lungs aside."""
    anatomy = Anatomy(
        patient,
        heart_growth=findings.heart_growth if "cardiomegaly" in present else 1.0,
        fluid_mm=findings.pericardial_mm if "pericardial_effusion" in present else 0.0,
        aorta_widening=findings.aorta_widening if "aortic_aneurysm" in present else (0.0, 0.0),
    )
    bulges = [(findings.nodes.points, findings.nodes.radii)] if "lymphadenopathy" in present else []
    return anatomy, bulges


class Painter:
    """Draws findings into a scene; `lesions` collects their masks {label: bool [n, H, W]} where wanted."""

    def __init__(self, scene: Scene, findings: Findings, lesions: dict[str, np.ndarray] | None):
        self.scene, self.findings, self.lesions = scene, findings, lesions
        self.whole = (slice(None), slice(None), slice(None))

    def mark(self, label: str, patch: Patch | None, place: int, threshold: float = 0.5) -> None:
        """Voxels covered by more than `threshold` that lie in region `place` belong to the lesion."""
        if self.lesions is not None and patch is not None:
            inside = (patch.alpha > threshold) & (self.scene.labels[patch.where] == place)
            self.lesions[label][patch.where] |= inside

    def draw(self, present: frozenset[str], sides: dict[str, tuple[bool, bool]]) -> None:
        """All findings in `present`, the lungs' ones on the sides where they are."""
        for label in ("emphysema", "ground_glass", "fibrosis", "consolidation", "nodule", "pleural_effusion"):
            for side in (0, 1):
                if label in present and sides[label][side]:
                    getattr(self, label)(side)
        for label in PLACES:
            if label in present:
                getattr(self, label)()

    def _lung_patch(self, patch: Patch | None, side: int) -> Patch | None:
        """Only the part within the lung on that side (0 right, 1 left)."""
        if patch is None:
            return None
        keep = self.scene.canvas.x[:, patch.where[1], patch.where[2]] * SIDES[side] > 2 * side
        return Patch(patch.where, patch.alpha * self.scene.lung[patch.where] * keep)

    def _cloud(self, label: str, cloud: Cloud, side: int, hu: float, strength=1.0, softness=0.0) -> Patch | None:
        patch = self._lung_patch(self.scene.canvas.tube(cloud.points, cloud.radii, softness=softness), side)
        self.mark(label, patch, 1 + side)
        if patch is not None:
            self.scene.canvas.paint(Patch(patch.where, patch.alpha * strength), hu)
        return patch

    def nodule(self, side: int) -> None:
        self._cloud("nodule", self.findings.nodule[side], side, 30 + 40 * self.findings.density)

    def consolidation(self, side: int) -> None:
        f, c = self.findings, self.scene.canvas
        patch = self._cloud("consolidation", f.consolidation[side], side, 10 + 40 * f.density, 0.95, 4.0)
        if patch is not None:  # air bronchograms
            points, radii = self.scene.anatomy.lung_vessels(c.voxel / 2, 1.4)
            within = np.zeros(c.shape, np.float32)
            within[patch.where] = patch.alpha
            c.paint(c.tube(points + (2, 4, 2), 0.7 * radii), -850, within)

    def ground_glass(self, side: int) -> None:
        f = self.findings
        self._cloud("ground_glass", f.ground_glass[side], side, 0, 0.32 + 0.16 * f.density, 9.0)

    def emphysema(self, side: int) -> None:
        f = self.findings
        self._cloud("emphysema", f.emphysema[side], side, -1000, 0.9, 2.0)

    def fibrosis(self, side: int) -> None:
        scene, f = self.scene, self.findings
        c = scene.canvas
        basal = np.clip((c.z + 85) / 90, 0.0, 1) * np.clip((c.y + 110) / 110, 0.35, 1)
        band = c.cover(scene.lung_depth - f.fibrosis_mm[side] * basal, 4.0) * np.clip(3 * basal, 0, 1)
        patch = self._lung_patch(Patch(self.whole, band), side)
        assert patch is not None
        self.mark("fibrosis", patch, 1 + side)
        # honeycomb: cysts a few mm wide between thick walls
        comb = np.sin(0.83 * c.x + 0.5 * c.z) * np.sin(0.9 * c.y - 0.3 * c.z) + 0.5 * np.sin(0.7 * c.z + 0.4 * c.x)
        c.paint(patch, -390 + 120 * f.density + 230 * comb)

    def pleural_effusion(self, side: int) -> None:
        scene, f = self.scene, self.findings
        c = scene.canvas
        thick = f.effusion_mm[side]
        rise = np.clip((c.z + 95) / 160, 0, 1)
        back = np.clip((c.y + 35) / 95, 0, 1)
        crescent = -scene.cage - thick * rise * back * back * (3 - 2 * back)
        patch = self._lung_patch(Patch(self.whole, c.cover(crescent)), side)
        assert patch is not None
        self.mark("pleural_effusion", patch, 1 + side)
        c.paint(patch, 4 + 14 * f.density)

    def cardiomegaly(self) -> None:
        self.mark("cardiomegaly", self.scene.heart, 3)

    def pericardial_effusion(self) -> None:
        heart, distance = self.scene.heart, self.scene.myocardium_mm
        if heart is not None and distance is not None:
            fluid = heart.alpha * self.scene.canvas.cover(4 - distance)
            self.mark("pericardial_effusion", Patch(heart.where, fluid), 3)

    def coronary_calcification(self) -> None:
        share, radii = self.findings.calcified
        for path, some in zip(_coronaries(self.scene.anatomy), np.array_split(np.arange(len(share)), 3), strict=True):
            points = path[(share[some] * (len(path) - 1)).astype(int)]
            c = self.scene.canvas
            patch = c.tube(points, radii[some])
            if patch is not None and self.scene.heart is not None:
                inside = np.zeros(c.shape, np.float32)
                inside[self.scene.heart.where] = self.scene.heart.alpha
                patch = Patch(patch.where, patch.alpha * inside[patch.where])
                c.paint(patch, 1000 + 600 * self.findings.density)
                self.mark("coronary_calcification", patch, 3, 0.2)

    def pacemaker(self) -> None:
        c, a = self.scene.canvas, self.scene.anatomy
        skin = float(a.skin_y([-72.0], [72.0])[0])
        depth = skin + 7 + 0.5 * a.patient.fat_mm
        c.paint(c.ellipsoid((-72, depth, 72), (21, 6.5, 24)), 2600)
        top = [(-88, depth, 64), (-114, -36, 62), (-104, -36, 20), (-92, -26, -20), (-55, -20, -29), (-10, -16, -31)]
        inside = [a.heart_point(q) for q in ((14, -12, -32), (36, -24, -22), (52, -46, 0), (56, -52, 24))]
        points, radii = smooth_path([*top, *map(tuple, inside)], 1.5, 1.0)
        radii[-8:] = 2.2
        lead = c.tube(points, radii)
        c.paint(lead, 3000)
        self.mark("pacemaker", lead, 3, 0.2)

    def aortic_aneurysm(self) -> None:
        wide, normal = self.scene.anatomy.great_vessels["aorta"], Anatomy(self.scene.anatomy.patient).great_vessels["aorta"]
        some = wide[1] > np.resize(normal[1], len(wide[1])) + 4 if len(wide[1]) == len(normal[1]) else wide[1] > 18.5
        if some.any():
            self.mark("aortic_aneurysm", self.scene.canvas.tube(wide[0][some], wide[1][some]), 4)

    def lymphadenopathy(self) -> None:
        c, nodes = self.scene.canvas, self.findings.nodes
        patch = c.tube(nodes.points, nodes.radii)
        if patch is not None:
            patch = Patch(patch.where, patch.alpha * (self.scene.labels[patch.where] == 5))
            c.paint(patch, 48 + 20 * self.findings.density)
            self.mark("lymphadenopathy", patch, 5)


def _coronaries(anatomy: Anatomy) -> list[np.ndarray]:
    """Left anterior descending, circumflex and right coronary artery: paths [N, 3] on the heart's surface, mm."""
    courses = (
        [(6, -34, 24), (20, -52, 38), (40, -62, 48), (58, -62, 58)],
        [(8, -22, 40), (20, -4, 56), (36, 8, 58)],
        [(8, -44, -14), (24, -48, -30), (46, -34, -34)],
    )
    paths = []
    for course in courses:
        points = smooth_path([tuple(anatomy.heart_point(q)) for q in course], 1.0, 3.0)[0]
        centre = anatomy.heart_point((28, -16, 10))
        ray = np.linspace(0.4, 1.7, 80)[None, :, None]
        along = centre + ray * (points - centre)[:, None]
        distance = anatomy.heart_mm(*np.moveaxis(along, -1, 0))
        last = along.shape[1] - 1 - np.argmax((distance < 1.0)[:, ::-1], axis=1)
        paths.append(along[np.arange(len(points)), last])
    return paths
