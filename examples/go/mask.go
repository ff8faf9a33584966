package main

import (
	"errors"
	"image"
	"image/color"
	"image/png"
	"io"

	pb "splitsamclick/splitsam/v1"
)

// runLengths decodes column-major run lengths, zeros first. A number is groups of five bits, the lowest first, each a
// character from "0" on with 32 added while more follow; it is negative where the last group's highest bit is set.
// From the fourth number on it is the difference to the last but one.
func runLengths(counts string) ([]int, error) {
	var runs []int
	for at := 0; at < len(counts); {
		value, shift, isLast := 0, 0, false
		for !isLast {
			if at == len(counts) {
				return nil, errors.New("the counts are cut short")
			}
			group := int(counts[at]) - '0'
			value |= group & 31 << shift
			at, shift, isLast = at+1, shift+5, group&32 == 0
			if isLast && group&16 != 0 {
				value |= -1 << shift
			}
		}
		if len(runs) > 2 {
			value += runs[len(runs)-2]
		}
		runs = append(runs, value)
	}
	return runs, nil
}

// pixels gives the rows of a mask, one byte a pixel: 1 inside, 0 outside.
func pixels(rle *pb.RunLengthEncoding) ([]byte, error) {
	height, width := int(rle.Size[0]), int(rle.Size[1])
	runs, err := runLengths(rle.Counts)
	if err != nil {
		return nil, err
	}
	rows, place := make([]byte, height*width), 0
	for index, run := range runs {
		if run < 0 || run > len(rows)-place {
			return nil, errors.New("the runs do not fill the size")
		}
		for end := place + run; place < end; place++ {
			rows[place%height*width+place/height] = byte(index % 2)
		}
	}
	return rows, nil
}

// writeOverlay writes a PNG to lay over the photo: a colour where the mask is, nothing elsewhere.
func writeOverlay(out io.Writer, rle *pb.RunLengthEncoding) error {
	rows, err := pixels(rle)
	if err != nil {
		return err
	}
	height, width := int(rle.Size[0]), int(rle.Size[1])
	picture := image.NewNRGBA(image.Rect(0, 0, width, height))
	for place, inside := range rows {
		picture.SetNRGBA(place%width, place/width, color.NRGBA{30, 144, 255, 128 * inside})
	}
	return png.Encode(out, picture)
}
