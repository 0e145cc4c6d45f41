// The voting page. Everything that people or models wrote is set as text, never as HTML.
const LETTERS = "ABCDEFGHI";
const part = (name) => element.querySelector(`[data-part="${name}"]`);
const state = { labeler: "", task: null, picks: [], ratings: [], tieNext: false, focus: 0, busy: false };

function node(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function say(text, kind = "") {
  part("status").textContent = text;
  part("status").dataset.kind = kind;
}

// picks is a list of places, each a list of replies that share it; whatever is not picked comes last
function ranks() {
  const places = state.task.replies.map(() => state.picks.length + 1);
  state.picks.forEach((place, number) => place.forEach((reply) => { places[reply] = number + 1; }));
  return places;
}

function picked(reply) { return state.picks.some((place) => place.includes(reply)); }

function pick(reply) {
  if (state.busy || !state.task || reply >= state.task.replies.length) return;
  const quick = state.task.replies.length === 2 && !state.task.ratings;
  if (quick) { state.picks = [[reply]]; save(); return; }
  state.focus = reply;
  const place = state.picks.findIndex((replies) => replies.includes(reply));
  if (place >= 0) state.picks = state.picks.slice(0, place);
  else if (state.tieNext && state.picks.length) state.picks[state.picks.length - 1].push(reply);
  else state.picks.push([reply]);
  state.tieNext = false;
  draw();
}

function tie() {
  if (state.busy || !state.task) return;
  if (!state.picks.length) { state.picks = [state.task.replies.map((_, number) => number)]; save(); return; }
  state.tieNext = !state.tieNext;
  draw();
}

function rate(value) {
  if (state.busy || !state.task || !state.task.ratings) return;
  state.ratings[state.focus] = state.ratings[state.focus] === value ? null : value;
  draw();
}

async function ask(call) {
  if (state.busy) return;
  state.busy = true;
  element.classList.add("busy");
  try {
    const answer = await call();
    if (answer.error) say(answer.error, "error");
    else show(answer);
  } catch (error) {
    say("Not saved: the server doesn't answer. Your answer is still here; try again in a moment.", "error");
  } finally {
    state.busy = false;
    element.classList.remove("busy");
  }
}

function save() {
  if (!state.task) return;
  if (!state.picks.length) { say("Pick the best reply first, or press T for a tie and S to skip.", "error"); return; }
  send({ ranks: ranks(), ratings: state.ratings, skipped: false });
}

function skip() { if (state.task) send({ ranks: [], ratings: [], skipped: true }); }

function send(answer) {
  const full = { task: state.task.id, turn: state.task.turn, ...answer };
  ask(() => server.vote({ labeler: state.labeler, answer: full }));
}

function undo() { if (state.labeler) ask(() => server.undo(state.labeler)); }

function start(name) {
  state.labeler = name.trim();
  ask(() => server.open_task(state.labeler));
}

function show(answer) {
  state.labeler = answer.labeler;
  try { localStorage.setItem("labeler", state.labeler); } catch (error) { /* private window */ }
  state.task = answer.task;
  state.picks = answer.task ? answer.task.picks : [];
  state.ratings = answer.task ? answer.task.given : [];
  state.tieNext = false;
  state.focus = 0;
  const { mine, done, tasks } = answer.progress;
  part("progress").value = tasks ? done / tasks : 1;
  part("count").textContent = `${state.labeler}: ${mine} answered. ${done} of ${tasks} questions have an answer.`;
  say(answer.message, "good");
  draw();
}

function drawPrompt() {
  const box = part("prompt");
  box.replaceChildren();
  for (const message of state.task.prompt) {
    const bubble = node("div", `message ${message.role === "assistant" ? "theirs" : "mine"}`);
    bubble.append(node("span", "role", message.role), node("span", "text", message.content));
    box.append(bubble);
  }
}

function drawReply(text, number) {
  const card = node("div", "reply");
  card.dataset.reply = number;
  const choose = node("button", "choose");
  choose.type = "button";
  const place = state.picks.findIndex((replies) => replies.includes(number));
  const badge = node("span", "badge", place >= 0 ? `${place + 1}.` : LETTERS[number]);
  if (place >= 0) card.classList.add("picked");
  if (state.task.ratings && number === state.focus) card.classList.add("focused");
  choose.setAttribute("aria-label", `Reply ${LETTERS[number]}${place >= 0 ? `, place ${place + 1}` : ""}: ${text}`);
  choose.append(badge, node("span", "text", text));
  choose.onclick = () => pick(number);
  card.append(choose);
  if (state.task.ratings) {
    const row = node("div", "ratings");
    for (let value = 1; value <= 7; value += 1) {
      const button = node("button", state.ratings[number] === value ? "rating on" : "rating", String(value));
      button.type = "button";
      button.setAttribute("aria-label", `Rate reply ${LETTERS[number]}: ${value} of 7`);
      button.setAttribute("aria-pressed", String(state.ratings[number] === value));
      button.onclick = () => { state.focus = number; rate(value); };
      row.append(button);
    }
    card.append(row);
  }
  return card;
}

function draw() {
  const inside = Boolean(state.labeler);
  part("name-form").hidden = inside;
  part("work").hidden = !inside || !state.task;
  part("bar").hidden = !inside;
  part("done").hidden = !inside || Boolean(state.task);
  if (!state.task) return;
  const quick = state.task.replies.length === 2 && !state.task.ratings;
  part("question").textContent = quick ? "Which reply is better?" : "Pick the replies from best to worst";
  drawPrompt();
  part("replies").dataset.count = state.task.replies.length;
  part("replies").replaceChildren(...state.task.replies.map(drawReply));
  part("save").hidden = quick;
  part("tie").classList.toggle("on", state.tieNext);
  part("tie").firstChild.textContent = state.picks.length && !quick ? "Next one ties " : "Tie ";
  const keys = LETTERS.slice(0, state.task.replies.length).split("").join(" ");
  part("keys").textContent =
    `Keys: ${keys} pick a reply, T tie, S skip, U undo` + (quick ? "." : ", Enter save.") +
    (state.task.ratings ? " 1 to 7 rate the marked reply; ← → mark another." : "");
}

function key(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.tagName === "INPUT") return;
  const pressed = event.key.toUpperCase();
  const actions = { T: tie, S: skip, U: undo, ENTER: save };
  if (pressed === "ENTER" && event.target.tagName === "BUTTON") return; // the button's own click
  if (actions[pressed]) actions[pressed]();
  else if (LETTERS.includes(pressed) && pressed.length === 1) pick(LETTERS.indexOf(pressed));
  else if ("1234567".includes(pressed) && pressed.length === 1) rate(Number(pressed));
  else if (pressed === "ARROWLEFT" || pressed === "ARROWRIGHT") {
    if (!state.task) return;
    const count = state.task.replies.length;
    state.focus = (state.focus + (pressed === "ARROWRIGHT" ? 1 : count - 1)) % count;
    draw();
  } else return;
  event.preventDefault();
}

part("name-form").onsubmit = (event) => { event.preventDefault(); start(part("name").value); };
part("tie").onclick = tie;
part("skip").onclick = skip;
part("undo").onclick = undo;
part("save").onclick = save;
part("rename").onclick = () => {
  state.labeler = "";
  state.task = null;
  try { localStorage.removeItem("labeler"); } catch (error) { /* private window */ }
  say("");
  draw();
  part("name").focus();
};
document.addEventListener("keydown", key);
const linked = new URLSearchParams(location.search).get("labeler");
let known = null;
try { known = localStorage.getItem("labeler"); } catch (error) { /* private window */ }
draw();
if (known && (!linked || linked === known)) start(known);
else { part("name").value = linked || ""; part("name").focus(); } // a link proposes a name; a person accepts it
