// Prints the pixels of run lengths, as JSON: [{ size, counts }, ...] comes in on stdin.
package main

import (
	"encoding/json"
	"os"

	pb "splitsamclick/splitsam/v1"
)

func main() {
	var masks []*pb.RunLengthEncoding
	if err := json.NewDecoder(os.Stdin).Decode(&masks); err != nil {
		panic(err)
	}
	decoded := make([][]byte, len(masks))
	for index, rle := range masks {
		var err error
		if decoded[index], err = pixels(rle); err != nil {
			panic(err)
		}
	}
	json.NewEncoder(os.Stdout).Encode(decoded)
}
