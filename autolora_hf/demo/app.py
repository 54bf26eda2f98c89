"""The page itself, made with Gradio."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import gradio as gr
import torch
from PIL import Image

from ..config import Norm, ThreatModel
from . import page
from .attack import answers_by_radius, attack_image
from .models import Demo
from .radii import Scale
from .uploads import Upload, read_example, read_upload


NORMS: tuple[Norm, ...] = ("linf", "l2", "l1")
# Up to so many seconds an attack, images and radii are attacked as soon as they are chosen.
_SOON = 3.0
# Images of visitors are deleted after this time, which is looked for as often.
_KEPT_SECONDS = 3600
_THUMBNAIL = 160


def build(demo: Demo) -> gr.Blocks:
    """The page, not yet served."""
    is_quick = _seconds_of_an_attack(demo) <= _SOON
    others = [classifier.name for classifier in demo.others]
    trained = _scale(demo, demo.threat_model.norm)
    events = _Events(demo)

    with gr.Blocks(
        analytics_enabled=False, title=f"Attack {demo.title}", delete_cache=(_KEPT_SECONDS, _KEPT_SECONDS)
    ) as app:
        gr.HTML(page.introduction(demo))
        image = gr.State(None)
        with gr.Row(elem_classes="al-pixelated" if page.is_small(demo.preprocessing.image_size) else None):
            with gr.Column(scale=1, min_width=300, elem_classes="al-controls"):
                gallery = None
                if demo.examples:
                    gallery = gr.Gallery(
                        [(_thumbnail(picture), name) for name, picture in demo.examples],
                        label="Choose an example …",
                        columns=5,
                        height="auto",
                        format="png",
                        object_fit="contain",
                        allow_preview=False,
                        interactive=False,
                        buttons=[],
                        selected_index=0,
                        elem_id="examples",
                    )
                upload = gr.File(label="… or upload an image" if demo.examples else "Upload an image", height=150)
                norm = gr.Radio(
                    [(ThreatModel(name).norm_name, name) for name in NORMS],
                    value=demo.threat_model.norm,
                    label="Threat model (norm of the perturbation)",
                )
                eps = gr.Slider(
                    0,
                    trained.largest,
                    value=trained.usual,
                    step=trained.step,
                    label="Radius ε, in [0, 1] pixels",
                    buttons=[],
                    elem_id="radius",
                )
                radius = gr.HTML(page.radius_line(trained, trained.usual))
                other = gr.Radio(
                    others, value=others[0] if others else None, label="Compare with", visible=len(others) > 1
                )
                button = gr.Button("Attack", variant="primary", elem_id="attack")
            with gr.Column(scale=3, min_width=320):
                problem = gr.HTML("", elem_id="problem")
                results = gr.HTML(page.invitation(), elem_id="results")
                curve = gr.HTML("", elem_id="curve")
        gr.HTML(page.about(demo))

        settings = [image, norm, eps, other]
        shown = [problem, results, curve]
        # One at a time: attacks use all cores, and a queue is fairer than many that crawl.
        turn: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "attack", "show_progress": "minimal"}
        private: dict[str, Any] = {"api_visibility": "private"}
        instant: dict[str, Any] = {"queue": False, "show_progress": "hidden", **private}

        button.click(events.attack, settings, shown, api_name="attack", scroll_to_output=True, **turn)
        follow = events.attack_if_ready if is_quick else events.show
        gr.on([eps.input, eps.change], events.radius_line, [norm, eps], radius, **instant)
        changed = norm.change(events.scale_of, norm, [eps, radius], **instant)
        if is_quick:
            gr.on([eps.input, other.change], follow, settings, shown, trigger_mode="always_last", **turn, **private)
            changed.then(follow, settings, shown, **turn, **private)
        uploaded = upload.upload(events.upload, upload, [image, *shown], api_name="upload", show_progress="hidden")
        uploaded.then(follow, settings, shown, **turn, **private)
        upload.clear(events.clear, None, [image, *shown], **instant)
        if gallery is not None:
            upload.upload(lambda: gr.Gallery(selected_index=None), None, gallery, **instant)
            picked = gallery.select(events.pick, None, [image, upload, *shown], **instant)
            picked.then(follow, settings, shown, **turn, **private)
            opened = app.load(lambda: events.example(0), None, image, **instant)
            opened.then(follow, settings, shown, **turn, **private)
    app.queue(max_size=32)
    return app


class _Events:
    """What the events of the page run; the images are kept by Gradio, one a visitor."""

    def __init__(self, demo: Demo) -> None:
        self.demo = demo

    def radius_line(self, norm: Norm, eps: float) -> str:
        scale = _scale(self.demo, norm)
        return page.radius_line(scale, scale.nearest(eps))

    def scale_of(self, norm: Norm) -> tuple[Any, str]:
        scale = _scale(self.demo, norm)
        slider = gr.Slider(maximum=scale.largest, step=scale.step, value=scale.usual)
        return slider, page.radius_line(scale, scale.usual)

    def upload(self, path: str | None) -> tuple[Upload | None, str, str, str]:
        if path is None:
            return self.clear()
        try:
            return read_upload(path, self.demo.preprocessing), "", page.invitation(), ""
        except (ValueError, OSError) as error:
            return None, page.message(str(error)), page.invitation(), ""

    def clear(self) -> tuple[None, str, str, str]:
        return None, "", page.invitation(), ""

    def pick(self, chosen: gr.SelectData) -> tuple[Upload, None, str, str, str]:
        return self.example(chosen.index), None, "", page.invitation(), ""

    def example(self, index: int) -> Upload:
        name, picture = self.demo.examples[index]
        is_class = name in (self.demo.label_names or ())
        return read_example(picture, self.demo.preprocessing, name if is_class else None)

    def show(self, image: Upload | None, norm: Norm, eps: float, other: str | None) -> Iterator[tuple[Any, ...]]:
        """The answers to the image as it is: where an attack takes long, it is made when it is asked for."""
        if image is None:
            yield (gr.skip(),) * 3
            return
        outcome = attack_image(self.demo.shown(other), image.pixels, norm, 0)
        yield "", page.results(self.demo, outcome, image.notes), ""

    def attack_if_ready(self, image: Upload | None, *settings: Any) -> Iterator[tuple[Any, ...]]:
        """An attack that nobody asked for: without an image there is nothing to say."""
        if image is None:
            yield (gr.skip(),) * 3
            return
        yield from self.attack(image, *settings)

    def attack(
        self, image: Upload | None, norm: Norm, eps: float, other: str | None
    ) -> Iterator[tuple[str, str, str]]:
        if image is None:
            yield page.message("There is no image yet: choose an example or upload one."), page.invitation(), ""
            return
        demo, scale = self.demo, _scale(self.demo, norm)
        eps, models = scale.nearest(eps), demo.shown(other)
        options = {"steps": demo.steps, "seed": demo.seed}
        outcome = attack_image(models, image.pixels, norm, eps, **options)
        results = page.results(demo, outcome, image.notes)
        yield "", results, ""
        radii, points = scale.curve(eps), []
        for point in answers_by_radius(models, image.pixels, norm, radii, known=outcome, **options):
            points.append(point)
            yield "", results, page.curve(demo, points, scale, eps, len(radii))


def _scale(demo: Demo, norm: Norm) -> Scale:
    return Scale.of(norm, demo.threat_model, demo.preprocessing.image_size)


def _seconds_of_an_attack(demo: Demo) -> float:
    """About how long one attack on two models takes here, from one step on each."""
    grey = torch.full((3, *demo.preprocessing.image_size), 0.5)
    models = demo.shown(demo.others[0].name if demo.others else None)
    options: dict[str, Any] = {"norm": demo.threat_model.norm, "eps": demo.threat_model.eps}
    attack_image(models, grey, steps=1, **options)  # the first pass of a model is slower
    started = time.perf_counter()
    attack_image(models, grey, steps=1, **options)
    # Steps go forward and backward, the answers before and after forward alone.
    return (time.perf_counter() - started) * (demo.steps + 1) / 2


def _thumbnail(picture: Image.Image) -> Image.Image:
    small = picture.copy()
    small.thumbnail((_THUMBNAIL, _THUMBNAIL))
    return small.convert("RGB")
