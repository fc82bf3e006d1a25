// Cropping of the image that is searched with.

import { announce, byId } from "./dom.js";
import { RegionFrame } from "./region_frame.js";
import { cropped } from "./upload.js";

/** @typedef {import("./drawing.js").Drawing} Drawing */

/**
 * Offers to crop the image on the canvas. Undo restores it.
 * @param {Drawing} drawing
 */
export function setUpCrop(drawing) {
  const button = byId("crop", HTMLButtonElement);
  const dialog = byId("cropper", HTMLDialogElement);
  const image = byId("cropper-image", HTMLImageElement);
  const frame = new RegionFrame(
    byId("cropper-stage", HTMLElement),
    image,
    byId("cropper-region", HTMLElement),
    byId("cropper-marking", HTMLElement),
  );
  const crop = async () => {
    const { image: source } = drawing;
    const { region } = frame;
    dialog.close();
    if (source === null || region === null) return;
    drawing.add({ kind: "image", image: await cropped(source, region) });
    announce("Searching with a part of the image.");
  };
  const update = () => {
    const isHidden = drawing.image === null;
    if (isHidden && document.activeElement === button) byId("upload", HTMLButtonElement).focus();
    button.hidden = isHidden;
  };
  drawing.addEventListener("change", update);
  update();
  button.addEventListener("click", () => {
    if (drawing.image === null) return;
    drawing.image.pixels.toBlob((blob) => {
      if (blob === null) return;
      image.src = URL.createObjectURL(blob);
      frame.show(null);
      dialog.showModal();
      frame.mark();
    });
  });
  frame.addEventListener("choose", () => void crop());
  byId("cropper-search", HTMLButtonElement).addEventListener("click", () => void crop());
  byId("cropper-close", HTMLButtonElement).addEventListener("click", () => dialog.close());
  dialog.addEventListener("close", () => URL.revokeObjectURL(image.src));
}
