"use strict";
// The cards carry all that is searched, filtered and ordered by; nothing is fetched.
const $ = (id) => document.getElementById(id);
const tools = $("tools"), noun = tools.querySelector("[data-noun]").dataset.noun, detail = $("detail"), list = $("cards");
const cards = [...list.children];
const chosen = (name) => tools.querySelector(`input[name=${name}]:checked`)?.value ?? "";
const visible = () => [...list.children].filter((card) => !card.hidden);
let open = null; // the card in the dialog

function filter() {
  const words = $("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const correct = chosen("correct");
  let count = 0;
  for (const card of cards) {
    const { text, correct: flag } = card.dataset;
    card.hidden = !(words.every((word) => text.includes(word)) && (correct === "" || flag === correct));
    count += !card.hidden;
  }
  $("count").textContent = count === cards.length ? `${count} images` : `${count} of ${cards.length}`;
  $("nothing").hidden = count > 0;
}

const ORDERS = {
  order: () => 0,
  rising: (a, b) => a.dataset.probability - b.dataset.probability,
  falling: (a, b) => b.dataset.probability - a.dataset.probability,
  class: (a, b) => a.dataset.class.localeCompare(b.dataset.class, undefined, { numeric: true }),
};

function sort() {
  const order = ORDERS[$("sort").value];
  list.append(...[...cards].sort((a, b) => order(a, b) || a.dataset.number - b.dataset.number));
}

function show() {
  const which = chosen("show");
  tools.dataset.show = which;
  for (const frame of list.querySelectorAll(".frame")) frame.dataset.show = which;
  if (open) drawDetail();
}

function setShow(which) {
  const input = tools.querySelector(`input[name=show][value=${which}]`);
  input.checked = true;
  input.parentElement.parentElement.scrollLeft = input.parentElement.offsetLeft - 120;
  show();
}

function frameOf(card, which) {
  const frame = card.querySelector(".frame").cloneNode(true);
  frame.dataset.show = which;
  return frame;
}

function openDetail(card) {
  open = card;
  const strip = [...tools.querySelectorAll("input[name=show]")].map((input) => {
    const button = document.createElement("button");
    const text = input.value.startsWith("l") ? `${noun} ${input.value.slice(1)}` : input.nextSibling.textContent;
    button.type = "button";
    button.dataset.which = input.value;
    button.append(frameOf(card, input.value), text);
    button.querySelector("img").alt = "";
    button.addEventListener("click", () => setShow(input.value));
    return button;
  });
  $("strip").replaceChildren(...strip);
  $("side").replaceChildren(...[...card.querySelector(".caption").children].map((part) => part.cloneNode(true)));
  $("side").className = card.className.replace("card", "");
  drawDetail();
  if (!detail.open) {
    detail.showModal();
    detail.focus(); // else the first button gets it
  }
}

function drawDetail() {
  const which = chosen("show"), all = visible();
  $("large").replaceChildren(frameOf(open, which));
  $("place").textContent = `${all.indexOf(open) + 1} of ${all.length}`;
  for (const button of $("strip").children) {
    const pressed = button.dataset.which === which;
    button.setAttribute("aria-pressed", pressed);
    if (pressed) $("strip").scrollLeft = button.offsetLeft - $("strip").offsetLeft - $("strip").clientWidth / 2 + button.offsetWidth / 2;
  }
}

function step(by) {
  const all = visible();
  openDetail(all[(all.indexOf(open) + by + all.length) % all.length]);
}

function stepLayer(by) {
  const all = [...tools.querySelectorAll("input[name=show]")].map((input) => input.value);
  setShow(all[(all.indexOf(chosen("show")) + by + all.length) % all.length]);
}

function moveFocus(key) {
  const buttons = visible().map((card) => card.querySelector(".open"));
  const at = buttons.indexOf(document.activeElement);
  const columns = getComputedStyle(list).gridTemplateColumns.split(" ").length;
  const by = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[key];
  const next = buttons[at < 0 ? 0 : at + by];
  next?.focus();
  next?.scrollIntoView({ block: "nearest" });
  return Boolean(next);
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const { key, target } = event, arrow = key.startsWith("Arrow");
  if (detail.open) {
    if (!arrow) return;
    if (key === "ArrowLeft" || key === "ArrowRight") step(key === "ArrowLeft" ? -1 : 1);
    else stepLayer(key === "ArrowUp" ? -1 : 1);
    event.preventDefault();
  } else if (target === $("search")) {
    if (key === "Escape") {
      if (!target.value) target.blur();
      target.value = "";
      filter();
    } else if ((key === "Enter" || key === "ArrowDown") && visible().length) visible()[0].querySelector(".open").focus();
    else return;
    event.preventDefault();
  } else if (key === "/") {
    $("search").focus();
    $("search").select();
    event.preventDefault();
  } else if (key === "Escape") {
    $("search").value = "";
    filter();
  } else if (arrow && !target.matches("input, select, summary") && moveFocus(key)) event.preventDefault();
});

tools.addEventListener("submit", (event) => event.preventDefault());
tools.addEventListener("input", ({ target }) => {
  if (target.name === "show") show();
  else if (target === $("sort")) sort();
  else filter();
});
$("nothing").querySelector("button").addEventListener("click", () => {
  tools.reset();
  sort();
  show();
  filter();
});
list.addEventListener("click", ({ target }) => {
  if (target.closest(".open")) openDetail(target.closest(".card"));
});
detail.addEventListener("close", () => {
  open?.querySelector(".open").focus();
  open = null;
});
detail.addEventListener("click", ({ target }) => {
  if (target === detail) detail.close();
});
$("previous").addEventListener("click", () => step(-1));
$("next").addEventListener("click", () => step(1));
$("close").addEventListener("click", () => detail.close());

tools.reset(); // a reloaded page would keep what was chosen before
show();
filter();
