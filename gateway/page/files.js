// Files in, by choosing, dropping or pasting; and files out.

/** Call `opened` with each image file that somebody hands to the page. */
export function takeFiles(input, stage, opened) {
  const take = (files) => {
    const file = [...(files ?? [])].find(({ type }) => type.startsWith("image/"));
    if (file) opened(file);
  };
  input.addEventListener("change", () => {
    take(input.files);
    input.value = ""; // the same file may be chosen again
  });
  addEventListener("paste", ({ clipboardData }) => take(clipboardData?.files));
  addEventListener("dragover", (event) => {
    event.preventDefault();
    stage.classList.add("dropping");
  });
  addEventListener("dragleave", ({ relatedTarget }) => relatedTarget ?? stage.classList.remove("dropping"));
  addEventListener("drop", (event) => {
    event.preventDefault(); // else the browser would leave the page to show the file
    stage.classList.remove("dropping");
    take(event.dataTransfer?.files);
  });
}

/** @param {Blob} content */
export function save(content, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(content);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}
