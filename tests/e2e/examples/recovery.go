// Asks for masks with keys and tokens that the decoder does not take, all at once; prints what each one got, as JSON.
//
//	recovery ENCODER DECODER TOKEN_FILE IMAGE UNKNOWN_KEY OTHER_MODELS_KEY
package main

import (
	"encoding/json"
	"errors"
	"os"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"

	pb "splitsamclick/splitsam/v1"
)

type object map[string]interface{}

func main() {
	content, _ := os.ReadFile(os.Args[3])
	encoder, _ := grpc.Dial(os.Args[1], grpc.WithInsecure())
	decoder, _ := grpc.Dial(os.Args[2], grpc.WithInsecure())
	sam := NewClient(encoder, decoder, strings.TrimSpace(string(content)), 100*time.Second)
	image, err := sam.Encode(os.Args[4])
	if err != nil {
		panic(err)
	}
	points := []*pb.Point{{X: 100, Y: 120, Label: pb.PointLabel_POINT_LABEL_FOREGROUND}}
	expired := &pb.Prompt{Points: points, MaskInput: &pb.Prompt_RefinementToken{RefinementToken: strings.Repeat("0", 64)}}
	answers := make([]object, 4)
	var under sync.WaitGroup
	ask := func(index int, key string, prompt *pb.Prompt) {
		defer under.Done()
		asked := image
		asked.Key = key
		found, masks, err := sam.Predict(asked, prompt, nil)
		var failure *Failure
		if err == nil {
			answers[index] = object{"key": found.Key, "area": masks[0].AreaPx}
		} else if errors.As(err, &failure) {
			field := object{"field": failure.Violations[0].Field}
			answers[index] = object{"reason": failure.Reason, "violations": []object{field}, "requestId": failure.RequestID}
		}
	}
	under.Add(4)
	go ask(0, os.Args[5], &pb.Prompt{Points: points})
	go ask(1, os.Args[6], &pb.Prompt{Points: points})
	go ask(2, image.Key, expired)
	go ask(3, "no key", &pb.Prompt{Points: points})
	under.Wait()
	json.NewEncoder(os.Stdout).Encode(object{"key": image.Key, "sent": image.Sent, "answers": answers})
}
