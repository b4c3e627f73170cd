"""Generated from chapters/13_annotation.py by chapters/export.py; edit the chapter."""

__all__ = [
    "button",
    "Session",
    "SCRIPT",
    "LOOK",
    "screen_class",
]


# ---------- chapters/13_annotation.py · In a notebook

import functools
import sqlite3

from llama2lib.desk import Desk


def button(key: str, label: str, on: bool = False, off: bool = False) -> dict:
    "A button of a screen, with its key; `on` is marked, `off` cannot be pressed."
    return {"key": key, "label": label, "on": on, "off": off}


class Session:
    """What a screen shows, `view()`, and what its keys do, `press`: a desk, somebody at it, and an item.

    A subclass says what there is to do next (`turn_to_next`, which sets `item`), how it looks (`view`), and what a key
    does (`handle`).
    """

    item: int | None = None  # what is on the screen

    def __init__(self, desk: Desk, who: str):
        self.desk, self.who, self.note = desk, who, ""
        self.turn_to_next()

    def press(self, key: str, item: int | None = None, text: str = ""):
        "A key or a click, meant for `item` (None: whatever is shown), and the text in the box. Errors become the note."
        self.note = ""
        if item is not None and item != self.item:
            self.note = f"'{key}' came late: it was meant for another pair"
            return
        try:
            self.handle(key, text)
        except (ValueError, sqlite3.Error, OSError) as error:
            self.note = f"not stored: {error}"

SCRIPT = """
function render({ model, el }) {
  let open = model.get("view").done ? "" : "g", view;
  const root = document.createElement("div");
  root.className = "annotate";
  root.tabIndex = 0;
  root.dataset.lmSuppressShortcuts = "true";
  el.append(root);

  function put(parent, kind, text = "", name = "") {
    const node = document.createElement(kind);
    node.textContent = text;
    node.className = name;
    parent.append(node);
    return node;
  }
  function press(key) {
    const fold = view.folds.find((fold) => fold[0] === key);
    if (fold) {
      open = open === key ? "" : key;
      draw();
    } else {
      root.classList.add("waiting");
      model.send({ key, item: view.item, text: root.querySelector("textarea")?.value ?? "" });
    }
  }
  function buttons(parent, row) {
    if (row.label) put(parent, "span", row.label, "label");
    for (const { key, label, on, off } of row.buttons) {
      const node = put(parent, "button", "", on ? "on" : "");
      put(node, "kbd", key);
      put(node, "span", label);
      node.dataset.key = key;
      node.disabled = off;
      node.ariaPressed = on;
      node.onclick = () => { press(key); root.focus({ preventScroll: true }); };
    }
  }
  function draw() {
    const text = root.querySelector("textarea")?.value ?? "", last = view?.item;
    view = model.get("view");
    root.replaceChildren();
    root.ariaLabel = view.title;
    const head = put(root, "div", "", "head");
    put(head, "b", view.title);
    const bar = put(head, "progress");
    bar.max = Math.max(view.done + view.left, 1);
    bar.value = view.done;
    put(head, "span", `${view.done} done, ${view.left} to go`);
    put(head, "span", "click here to use the keys", "hint");
    for (const remark of view.remarks) put(root, "div", remark, "remark");
    for (const [role, said] of view.messages) {
      const message = put(root, "div", "", "message");
      put(message, "b", role);
      put(message, "div", said);
    }
    const pair = put(root, "div", "", "pair");
    view.answers.forEach((answer, i) => {
      const side = put(pair, "div", "", "answer");
      put(side, "b", ["Left", "Right"][i]);
      put(side, "div", answer);
    });
    const wide = view.rows.filter((_, i) => i < view.rows.length - 2);
    for (const row of wide) buttons(put(root, "div", "", "row"), row);
    const scale = put(root, "div", "", "pair");
    for (const row of view.rows.slice(wide.length)) buttons(put(scale, "div", "", "row"), row);
    if (view.ask) {
      const box = put(root, "textarea");
      box.placeholder = view.ask;
      box.value = view.item === last ? text : "";
    }
    const folds = view.folds.map(([key, label]) => ({ key, label, on: open === key }));
    buttons(put(root, "div", "", "row"), { buttons: [...view.more, ...folds] });
    for (const [, , parts] of view.folds.filter((fold) => fold[0] === open)) {
      const page = put(root, "div", "", "page");
      for (const [title, lines] of parts) {
        put(page, "b", title);
        const list = put(page, "ul");
        for (const line of lines) put(list, "li", line);
      }
    }
  }
  root.addEventListener("keydown", (event) => {
    if (event.target.tagName === "TEXTAREA") {
      if (event.key === "Escape") root.focus();
      return event.stopPropagation();
    }
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const node = root.querySelector(`button[data-key="${CSS.escape(event.key.toLowerCase())}"]`);
    if (!node) return;
    event.preventDefault();
    event.stopPropagation();
    if (!event.repeat) press(node.dataset.key);
  });
  model.on("change:view", () => { root.classList.remove("waiting"); draw(); });
  draw();
}
export default { render };
"""
LOOK = """
.annotate { color: var(--jp-content-font-color1, #222); border: 1px solid var(--jp-border-color1, #bbb); padding: 12px;
  border-radius: 4px; font: 14px/1.45 var(--jp-content-font-family, sans-serif); max-width: 72em; }
.annotate:focus, .annotate:focus-within { outline: 2px solid var(--jp-brand-color1, #1976d2); outline-offset: -2px; }
.annotate:focus-within .hint { visibility: hidden; }
.annotate .hint, .annotate .label { color: var(--jp-content-font-color2, #666); }
.annotate .head { display: flex; gap: 1em; align-items: center; flex-wrap: wrap; margin-bottom: 8px; }
.annotate .head progress { flex: 1; min-width: 6em; }
.annotate .message > div, .annotate .answer > div { white-space: pre-wrap; overflow-wrap: anywhere; }
.annotate .message { margin: 8px 0; }
.annotate .pair { display: grid; grid-template-columns: 1fr 1fr; gap: 12px; }
.annotate .answer { background: var(--jp-layout-color2, #f2f2f2); padding: 8px 12px; border-radius: 4px; min-width: 0; }
.annotate .answer > div { max-height: 26em; overflow-y: auto; }
.annotate .row { display: flex; flex-wrap: wrap; gap: 6px; align-items: center; margin-top: 10px; }
.annotate .pair .row { display: grid; grid-template-columns: repeat(auto-fill, minmax(13em, 1fr)); }
.annotate .pair .label { grid-column: 1 / -1; }
.annotate button { font: inherit; text-align: left; color: inherit; cursor: pointer; padding: 3px 8px;
  border-radius: 4px; border: 1px solid var(--jp-border-color1, #bbb); background: var(--jp-layout-color1, #fff); }
.annotate button:hover:enabled { background: var(--jp-layout-color2, #eee); }
.annotate button.on { border-color: var(--jp-brand-color1, #1976d2); box-shadow: inset 0 0 0 1px; font-weight: 600; }
.annotate button:disabled { opacity: 0.45; cursor: default; }
.annotate.waiting { opacity: 0.5; transition: opacity 0s 0.4s; }
.annotate kbd { font: 12px monospace; border: 1px solid var(--jp-border-color1, #bbb); border-radius: 3px;
  padding: 0 4px; margin-right: 6px; }
.annotate textarea { width: 100%; box-sizing: border-box; margin-top: 10px; min-height: 3em; font: inherit; }
.annotate .remark { border-left: 4px solid var(--jp-warn-color1, #e65100); padding: 2px 8px; margin: 6px 0; }
.annotate .page { margin-top: 10px; border-top: 1px solid var(--jp-border-color2, #ddd); padding-top: 8px; }
.annotate .page ul { margin: 2px 0 8px; padding-left: 20px; }
"""


@functools.cache
def screen_class() -> type:
    "The widget class `Screen(session)`. ImportError, with what to install, where anywidget is absent."
    try:
        import anywidget
        import traitlets
    except ImportError:
        raise ImportError("the annotation widget needs anywidget: pip install anywidget") from None

    class Screen(anywidget.AnyWidget):
        "A session on a screen; `press` does in Python what a key does in the browser."

        _esm, _css = SCRIPT, LOOK
        view = traitlets.Dict().tag(sync=True)

        def __init__(self, session: Session):
            super().__init__(view=session.view() | {"turn": 0})
            self.session = session
            self.on_msg(lambda _, sent, __: self.press(sent["key"], sent["item"], sent["text"]))

        def press(self, key: str, item: int | None = None, text: str = ""):
            self.session.press(key, item, text)
            self.view = self.session.view() | {"turn": self.view["turn"] + 1}  # always a change: it ends the waiting

    return Screen
