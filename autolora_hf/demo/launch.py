"""Serving the page. Gradio is imported here and not before, since it takes seconds and may be missing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from .models import Demo
from .uploads import MOST_BYTES


def import_gradio() -> Any:
    """Gradio, with its telemetry off.

    Raises:
        ModuleNotFoundError: If it is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise ModuleNotFoundError(
            'The demo needs Gradio 6, which is not installed: pip install "autolora-hf[demo]"', name="gradio"
        ) from error
    return gradio


def launch(
    demo: Demo, *, host: str | None = None, port: int | None = None, share: bool = False, **options: Any
) -> Any:
    """Serves the page, and returns what Gradio's `launch` does.

    Args:
        demo (`Demo`): What to show.
        host (`str`, *optional*): Address to listen at. `None`: that of the environment variable GRADIO_SERVER_NAME,
            as a Space sets it, else this machine alone.
        port (`int`, *optional*): `None`: GRADIO_SERVER_PORT, else the first free one from 7860.
        share (`bool`): Make a public link through Gradio's servers.
        **options: Further ones of Gradio's `launch`.

    Raises:
        ModuleNotFoundError: If Gradio is not installed.
        OSError: If the port is taken, or this machine cannot reach its own page.
    """
    gradio = import_gradio()
    from .app import build

    page = build(demo)
    try:
        return _launched(gradio, page, host, port, share, options)
    except OSError as error:
        if port is None or "Cannot find empty port" not in str(error):
            raise
        raise OSError(f"Another program has port {port}: choose another one (`--port`), or none.") from error
    except ValueError as error:
        # Gradio asks its own page once, and otherwise advises to share it with the world.
        if "localhost is not accessible" not in str(error):
            raise
        address = page.local_url
        page.close(verbose=False)
        raise OSError(
            f"The page did not answer within 3 seconds at {address}, so it is not served. If a proxy is set, exempt "
            "this machine from it: NO_PROXY=127.0.0.1,localhost. If the machine is busy, try again."
        ) from error


def _launched(gradio: Any, page: Any, host: str | None, port: int | None, share: bool, options: dict[str, Any]) -> Any:
    return page.launch(
        server_name=host,
        server_port=port,
        share=share,
        theme=gradio.themes.Default(primary_hue="blue", neutral_hue="slate", font=["system-ui", "sans-serif"]),
        css=(Path(__file__).parent / "style.css").read_text(),
        footer_links=[],
        # Larger files than these are cut off while they arrive; smaller ones get a message of ours.
        max_file_size=4 * MOST_BYTES,
        run_history=False,
        ssr_mode=False,
        enable_monitoring=False,
        **options,
    )
