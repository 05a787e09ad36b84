"""A chat page over the server: streams through the official client, shows who answered and how sure the base was."""

import html
import logging
import os
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.serving.client import connect, connect_async, plain_errors, routing_of
from cogumi_dagster.lib.serving.server import bind

if TYPE_CHECKING:
    import gradio as gr

logger = logging.getLogger(__name__)

Turn = dict[str, Any]

EXAMPLES = (
    "Write a Python function that returns the squares of the even numbers in a list.",
    "Ann has 3 boxes with 12 pens each and gives away 7 pens. How many are left?",
    "Three meetings: [9-11], [10-12], [11-13]. Are two rooms enough?",
    "Write two sentences about the sea in winter.",
)
MODEL_WORDS = {
    "cogumi": "Routed",
    "cogumi-base": "Base",
    "cogumi-code": "Code",
    "cogumi-reasoning": "Reasoning",
    "cogumi-automation": "Automation",
}
CSS = """
.gradio-container { width: 100% !important; min-width: 0 !important; max-width: 860px !important;
  box-sizing: border-box; margin: 0 auto !important; padding: 12px 16px !important; }
.gradio-container .column, .gradio-container .form { min-width: 0 !important; }
.gradio-container > .main, .gradio-container .wrap, .gradio-container main { min-width: 0; padding: 0 !important; }
#head { padding: 4px 4px 0; }
#head h1 { font-size: 1.4rem; font-weight: 650; letter-spacing: -0.01em; margin: 0; }
#head p { margin: 2px 0 0; color: var(--body-text-color-subdued); font-size: 0.9rem; }
#models { border-width: 0 !important; background: none; padding: 2px 4px; }
#models .wrap { gap: 6px; }
#talk { border-width: 0 !important; background: none; height: calc(100dvh - 225px) !important; min-height: 300px; }
#talk .message { max-width: 100%; overflow-x: auto; }
#talk .placeholder-content { justify-content: center; }
#talk .examples { grid-template-columns: repeat(auto-fit, minmax(280px, 1fr)); gap: 10px; }
#ask textarea { font-size: 1rem; }
.note { font-size: 0.85rem; opacity: 0.75; }
.route { display: inline-flex; flex-wrap: wrap; align-items: center; gap: 4px 10px; font-size: 0.78rem;
  line-height: 1.4; color: var(--body-text-color-subdued); font-variant-numeric: tabular-nums; }
.route b { font-weight: 600; padding: 1px 8px; border-radius: 99px; color: #1e4d43; background: #d7efe7; }
.route b.modifier { color: #5b3a0b; background: #fbe7c3; }
.route .bar { display: inline-block; width: 56px; height: 5px; border-radius: 3px; vertical-align: middle;
  background: var(--border-color-primary); overflow: hidden; }
.route .bar i { display: block; height: 100%; background: #2f9e80; }
.dark .route b { color: #b9f0de; background: #17463b; }
.dark .route b.modifier { color: #ffdfa3; background: #57400f; }
"""


def build_chat(base_url: str, token: str) -> "gr.Blocks":
    """The page. The token stays in this process: the browser talks to the page, the page to the server.

    Raises:
        CogumiError: no server at ``base_url``, or it refuses the token.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read at import
    import gradio as gr

    with plain_errors(base_url), connect(base_url, token) as client:
        models = [model.id for model in client.models.list()]
    choices = [(MODEL_WORDS.get(name, name.removeprefix("cogumi-").capitalize()), name) for name in models]

    page: gr.Blocks
    with gr.Blocks(title="Cogumi", analytics_enabled=False, fill_height=True) as page:
        gr.HTML("<h1>Cogumi</h1><p>The base answers where it is sure, a modifier where it is not.</p>", elem_id="head")
        model = gr.Radio(choices, value=models[0], show_label=False, container=False, elem_id="models")
        talk = gr.Chatbot(
            show_label=False, scale=1, elem_id="talk", layout="bubble", buttons=[],
            placeholder="Ask something. The line under each answer says who gave it.",
            examples=[{"text": text} for text in EXAMPLES],
        )  # fmt: skip
        box = gr.Textbox(
            placeholder="Your question", show_label=False, container=False, autofocus=True, elem_id="ask",
            submit_btn=True, max_lines=6,
        )  # fmt: skip
        history = gr.State([])

        async def respond(
            text: str, turns: list[Turn], chosen: str
        ) -> AsyncIterator[tuple[Any, list[Turn], list[Turn]]]:
            async for told in converse(base_url, token, text, turns, chosen):
                yield gr.Textbox("", submit_btn=False, stop_btn=True), told, shown(told)
            yield gr.Textbox(submit_btn=True, stop_btn=False), told, shown(told)

        def stop(turns: list[Turn]) -> tuple[Any, list[Turn], list[Turn]]:
            told = stopped(turns)
            return gr.Textbox(submit_btn=True, stop_btn=False), told, shown(told)

        def choose(example: gr.SelectData) -> str:
            return str(example.value["text"])

        outputs = [box, history, talk]
        asked = box.submit(respond, [box, history, model], outputs, show_progress="hidden")
        picked = talk.example_select(choose, None, box).then(
            respond, [box, history, model], outputs, show_progress="hidden"
        )
        ended = box.stop(None, None, None, cancels=[asked, picked])  # one event cannot both cancel and show
        ended.then(stop, [history], outputs, show_progress="hidden")
        cleared = talk.clear(None, None, None, cancels=[asked, picked])
        cleared.then(lambda: (gr.Textbox(submit_btn=True, stop_btn=False), []), None, [box, history])
    return page


async def converse(base_url: str, token: str, text: str, turns: list[Turn], model: str) -> AsyncIterator[list[Turn]]:
    """The conversation with ``text`` and, growing, its answer. A failure is shown as the answer's note, not raised."""
    if not text.strip():
        yield turns
        return
    asked = [*turns, {"role": "user", "content": text.strip()}]
    yield [*asked, {"role": "assistant", "content": "", "pending": True}]
    said, problem = "", ""
    routing: dict[str, Any] = {}
    messages: Any = [{"role": turn["role"], "content": turn["content"]} for turn in asked if turn["content"]]
    try:
        with plain_errors(base_url):
            async with (
                connect_async(base_url, token) as client,
                await client.chat.completions.create(model=model, messages=messages, stream=True) as stream,
            ):
                async for chunk in stream:
                    routing = routing_of(chunk) or routing
                    piece = chunk.choices[0].delta.content if chunk.choices else None
                    if piece:
                        said += piece
                        yield [*asked, {"role": "assistant", "content": said}]
    except CogumiError as error:
        problem = str(error)
    yield [*asked, {"role": "assistant", "content": said, "routing": routing, "problem": problem}]


def stopped(turns: list[Turn]) -> list[Turn]:
    """The turns after the user stopped the answer: what was said stays."""
    if not turns or turns[-1]["role"] != "assistant" or "routing" in turns[-1]:
        return turns
    return [*turns[:-1], {"role": "assistant", "content": turns[-1]["content"], "routing": {}, "problem": "stopped"}]


def shown(turns: list[Turn]) -> list[Turn]:
    """The turns as the page shows them. The route is a part of its own: an open code fence cannot swallow it."""
    rows: list[Turn] = []
    for turn in turns:
        parts = [{"type": "text", "text": turn["content"]}] if turn["content"] else []
        if turn.get("pending"):
            parts.append({"type": "text", "text": '<span class="note">thinking ...</span>'})
        if turn.get("problem"):
            parts.append({"type": "text", "text": f'<span class="note">{html.escape(turn["problem"])}</span>'})
        elif turn.get("routing"):
            parts.append({"type": "text", "text": route_line(turn["routing"])})
        rows.append({"role": turn["role"], "content": parts})
    return rows


def route_line(routing: dict[str, Any]) -> str:
    """One line of HTML: who answered, how sure the base was, the domain, and why if the user complained."""
    route = str(routing.get("route", "?"))
    modifier = routing.get("modifier")
    badge = (
        f'<b class="modifier">modifier {html.escape(str(modifier))}</b>' if modifier else f"<b>{html.escape(route)}</b>"
    )
    parts = [badge]
    confidence = routing.get("confidence")
    if isinstance(confidence, int | float):
        share = round(100 * min(1.0, max(0.0, confidence)))
        bar = f'<span class="bar"><i style="width:{share}%"></i></span>'
        parts.append(f"<span>base confidence {confidence:.2f} {bar}</span>")
    else:
        parts.append("<span>chosen by hand</span>")
    if routing.get("domain"):
        parts.append(f"<span>domain {html.escape(str(routing['domain']))}</span>")
    if routing.get("escalated"):
        reason = html.escape(str(routing.get("reason", "")), quote=True)
        parts.append(f'<span title="{reason}">escalated</span>')
    return f'<span class="route">{"".join(parts)}</span>'


def launch_chat(base_url: str, token: str, port: int, *, host: str = "127.0.0.1", block: bool = True) -> "gr.Blocks":
    """Show the page on ``port``; return at once unless ``block``. Nothing is loaded from elsewhere.

    Raises:
        CogumiError: the port is in use, or what ``build_chat`` raises.
    """
    bind(host, port).close()
    page = build_chat(base_url, token)
    import gradio as gr

    theme = gr.themes.Soft(
        primary_hue="emerald", neutral_hue="stone", font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )  # fmt: skip
    page.launch(
        server_name=host, server_port=port, share=False, inbrowser=False, quiet=True, prevent_thread_lock=not block,
        theme=theme, css=CSS, footer_links=[], ssr_mode=False, enable_monitoring=False, strict_cors=True,
    )  # fmt: skip
    return page


def run_chat(base_url: str, token: str, port: int) -> None:
    """Show the page until interrupted; what ``cogumi chat`` runs. Raises CogumiError as ``launch_chat`` does."""
    print(f"chat      http://127.0.0.1:{port}")
    launch_chat(base_url, token, port)
