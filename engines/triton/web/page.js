// Reads events of /stream: draws each frame when it comes, and plays what there is in a loop.
"use strict";

const FRAMES_A_SECOND = 12;
const element = (id) => document.getElementById(id);
const canvas = element("canvas");
const pen = canvas.getContext("2d");

let source = null; // of events, while a video is being made
let frames = []; // images, in order
let shown = 0; // index of the frame to draw next
let seed = "";

function say(state, text) {
  element("stage").dataset.state = state;
  element("status").textContent = text;
}

function end(state, text) {
  source?.close();
  source = null;
  element("start").hidden = false;
  element("stop").hidden = true;
  say(state, text);
}

function start(event) {
  event.preventDefault();
  const query = new URLSearchParams(new FormData(element("form")));
  frames = [];
  shown = 0;
  seed = "";
  element("stage").dataset.blank = "";
  element("strip").replaceChildren();
  element("progress").value = 0;
  element("start").hidden = true;
  element("stop").hidden = false;
  say("waiting", "Waiting for the server …");
  source = new EventSource(`stream?${query}`);
  source.onmessage = (message) => hear(JSON.parse(message.data));
  source.onerror = () => end("failed", "The page's server is gone.");
}

function hear(said) {
  if (said.error) return end("failed", said.error);
  if (said.done) {
    element("progress").value = 1;
    return end("done", `${frames.length} frames, seed ${seed}`);
  }
  if (said.progress !== undefined) {
    element("progress").value = said.progress;
    if (!frames.length) say("working", `${Math.round(100 * said.progress)} %`);
  }
  if (said.seed !== undefined) seed = said.seed;
  if (said.frame) show(said.frame, said.index);
}

function show(address, index) {
  const image = new Image();
  image.src = address;
  image.alt = `frame ${index}`;
  frames.push(image);
  const item = document.createElement("li");
  item.append(image.cloneNode());
  element("strip").append(item);
  element("strip").scrollLeft = element("strip").scrollWidth;
  delete element("stage").dataset.blank;
  say("working", `frame ${index + 1}`);
}

function play() {
  const image = frames[shown];
  if (image?.complete) {
    if (canvas.width !== image.width || canvas.height !== image.height) {
      canvas.width = image.width;
      canvas.height = image.height;
    }
    pen.drawImage(image, 0, 0);
    shown = (shown + 1) % frames.length;
  }
}

element("form").addEventListener("submit", start);
element("stop").addEventListener("click", () => end("done", `Stopped after ${frames.length} frames.`));
setInterval(play, 1000 / FRAMES_A_SECOND);
