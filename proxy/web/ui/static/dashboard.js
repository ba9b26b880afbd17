// What a page cannot do by itself: stay up to date, and remember the token while its tab is open. Everything else works
// without this file. No library: there is not enough here to need one.
"use strict";

const EVERY_MS = 2000;
const TOKEN = "breakwater-admin-token";

function keepUpToDate(place) {
  const box = document.querySelector("[data-updates]");
  const state = box.querySelector("[data-updates-state]");
  const button = box.querySelector("[data-pause]");
  let paused = false;
  let failing = false;
  box.hidden = false;

  // Said to a screen reader only when it changes: an announcement every two seconds would be unbearable.
  const say = (words) => { if (state.textContent !== words) state.textContent = words; };

  button.addEventListener("click", () => {
    paused = !paused;
    button.setAttribute("aria-pressed", String(paused));
    say(paused ? "Updates are paused" : "");
    if (!paused) update();
  });

  function take(html) {
    const fresh = new DOMParser().parseFromString(html, "text/html");
    for (const section of fresh.querySelectorAll("section[id]")) {
      const shown = document.getElementById(section.id);
      // What somebody is at is left alone until they go on.
      if (shown && !shown.contains(document.activeElement) && shown.innerHTML !== section.innerHTML) {
        shown.replaceChildren(...section.childNodes);
      }
    }
  }

  async function update() {
    if (paused || document.visibilityState === "hidden") return;
    try {
      const answer = await fetch(place.dataset.live, { headers: { Accept: "text/html" }, cache: "no-store" });
      if (!answer.ok) throw new Error(String(answer.status));
      take(await answer.text());
      if (failing) say("");
      failing = false;
    } catch {
      failing = true;
      say("No answer; trying again");
    }
  }

  const loop = () => update().finally(() => setTimeout(loop, EVERY_MS));
  setTimeout(loop, EVERY_MS);
}

function rememberToken(field) {
  field.value = sessionStorage.getItem(TOKEN) ?? "";
  field.form.addEventListener("submit", () => sessionStorage.setItem(TOKEN, field.value));
}

document.querySelectorAll("[data-live]").forEach(keepUpToDate);
document.querySelectorAll("[data-token]").forEach(rememberToken);
