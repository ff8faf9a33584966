// The labels of one image as COCO's JSON, with masks as run lengths or as polygons, in the fields of `splitsam export`.

/**
 * @param {{name: string, width: number, height: number}} image
 * @param {{label: string, mask: object}[]} objects masks as `/v1/masks` answers them, with rle, polygons, area and box
 * @param {string[]} labels their place, from 1, is the category's id
 * @param {"rle" | "polygons"} kind
 */
export function cocoFile(image, objects, labels, kind) {
  const annotations = objects
    .filter(({ mask }) => mask !== null && mask.box !== null)
    .map(({ label, mask }, index) => ({
      id: index + 1,
      image_id: 1,
      category_id: labels.indexOf(label) + 1,
      segmentation: kind === "rle" ? mask.rle : rings(mask),
      area: mask.area,
      bbox: [mask.box[0], mask.box[1], mask.box[2] - mask.box[0], mask.box[3] - mask.box[1]],
      iscrowd: 0,
      predicted_iou: mask.score,
      stability_score: mask.stability,
    }));
  return {
    images: [{ id: 1, file_name: image.name, width: image.width, height: image.height }],
    categories: labels.map((name, index) => ({ id: index + 1, name })),
    annotations,
  };
}

/** Pieces too thin for a polygon are left out; where all are, the run lengths stand in. */
function rings({ polygons, rle }) {
  const found = polygons.filter(({ outer }) => areaOf(outer) !== 0).map(joinHoles);
  return found.length > 0 ? found : rle;
}

function areaOf(ring) {
  let twice = 0;
  for (let at = 0; at < ring.length; at += 2) {
    const next = (at + 2) % ring.length;
    twice += ring[at] * ring[next + 1] - ring[next] * ring[at + 1];
  }
  return twice / 2;
}

/**
 * One ring for a polygon with holes, since COCO's have none: to each hole and back leads a cut without width, between
 * the two points that are nearest to one another.
 *
 * @param {{outer: number[], holes: number[][]}} polygon rings as x0, y0, x1, y1, ...
 * @returns {number[]}
 */
export function joinHoles({ outer, holes }) {
  return holes.reduce((ring, hole) => {
    const [at, from] = nearest(ring, hole);
    const around = [...hole.slice(from), ...hole.slice(0, from), hole[from], hole[from + 1]];
    return [...ring.slice(0, at + 2), ...around, ...ring.slice(at)];
  }, outer);
}

function nearest(ring, hole) {
  let best = [0, 0];
  let least = Infinity;
  for (let at = 0; at < ring.length; at += 2) {
    for (let from = 0; from < hole.length; from += 2) {
      const distance = (ring[at] - hole[from]) ** 2 + (ring[at + 1] - hole[from + 1]) ** 2;
      if (distance < least) [least, best] = [distance, [at, from]];
    }
  }
  return best;
}
