// A client of both services: looks an image up before it sends it, waits as it is told, encodes again what has expired.
// protos/PROTOCOL.md says what each of these rules is for.
package main

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	pb "splitsamclick/splitsam/v1"
)

const attempts = 5

// Failure is what a call that failed says: a gRPC code, a stable reason, refused fields, and when to come again.
type Failure struct {
	Code       codes.Code
	Reason     string
	Message    string
	RequestID  string
	Violations []*errdetails.BadRequest_FieldViolation
	RetryAfter time.Duration // 0 when waiting would not help
}

func (f *Failure) Error() string {
	return fmt.Sprintf("%s [%s]", f.Message, f.Reason)
}

func failureOf(err error) *Failure {
	said := status.Convert(err)
	failure := &Failure{Code: said.Code(), Reason: said.Code().String(), Message: said.Message()}
	for _, detail := range said.Details() {
		switch detail := detail.(type) {
		case *errdetails.ErrorInfo:
			failure.Reason, failure.RequestID = detail.Reason, detail.Metadata["request_id"]
		case *errdetails.BadRequest:
			failure.Violations = detail.FieldViolations
		case *errdetails.RetryInfo:
			delay := detail.GetRetryDelay()
			failure.RetryAfter = time.Duration(delay.GetSeconds())*time.Second + time.Duration(delay.GetNanos())
		}
	}
	return failure
}

func (f *Failure) mayRetry() bool {
	return f.RetryAfter > 0 && (f.Code == codes.ResourceExhausted || f.Code == codes.Unavailable)
}

// Client may be used from many goroutines.
type Client struct {
	encoder pb.EncoderServiceClient
	decoder pb.DecoderServiceClient
	token   string
	timeout time.Duration // of one Encode or one Predict, waits included
}

// NewClient takes a connection to each service; without a token no credentials are sent.
func NewClient(encoder, decoder grpc.ClientConnInterface, token string, timeout time.Duration) *Client {
	return &Client{pb.NewEncoderServiceClient(encoder), pb.NewDecoderServiceClient(decoder), token, timeout}
}

// Image is a handle to an encoded image; Sent says whether its bytes had to be.
type Image struct {
	Path, Key     string
	Width, Height uint32
	Sent          bool
}

// Encode encodes the image file at a path; its bytes are sent only if nobody has encoded it yet.
func (c *Client) Encode(path string) (Image, error) {
	ctx, cancel := c.begin()
	defer cancel()
	return c.encode(ctx, path)
}

func (c *Client) encode(ctx context.Context, path string) (Image, error) {
	content, err := os.ReadFile(path)
	if err != nil {
		return Image{}, err
	}
	digest := sha256.Sum256(content)
	var found *pb.LookUpEmbeddingResponse
	err = call(ctx, "CACHE_UNAVAILABLE", func() (err error) {
		found, err = c.encoder.LookUpEmbedding(ctx, &pb.LookUpEmbeddingRequest{ImageSha256: digest[:]})
		return err
	})
	// Without a cache nothing can be looked up, and the image has to be sent.
	if err != nil && !isReason(err, "CACHE_UNAVAILABLE") {
		return Image{}, err
	}
	if found.GetFound() {
		return handle(path, found.Embedding, false), nil
	}
	var made *pb.EncodeImageResponse
	err = call(ctx, "", func() (err error) {
		made, err = c.encoder.EncodeImage(ctx, &pb.EncodeImageRequest{Image: content})
		return err
	})
	if err != nil {
		return Image{}, err
	}
	return handle(path, made.Embedding, true), nil
}

// Predict gives the masks of one prompt on an image, and the handle to go on with.
//
// An embedding that has expired, or that another model made, is encoded again, once. A refinement token that has
// expired is left out: the answer is then the prompt's own mask, unrefined.
func (c *Client) Predict(image Image, prompt *pb.Prompt, output *pb.OutputOptions) (Image, []*pb.PredictedMask, error) {
	ctx, cancel := c.begin()
	defer cancel()
	for isRenewed := false; ; {
		images := []*pb.ImagePrompts{{EmbeddingKey: image.Key, Prompts: []*pb.Prompt{prompt}}}
		var answer *pb.PredictMasksResponse
		err := call(ctx, "", func() (err error) {
			answer, err = c.decoder.PredictMasks(ctx, &pb.PredictMasksRequest{Images: images, Output: output})
			return err
		})
		switch {
		case err == nil:
			return image, answer.Images[0].Prompts[0].Masks, nil
		case isReason(err, "REFINEMENT_EXPIRED") && (len(prompt.Points) > 0 || prompt.Box != nil):
			prompt = proto.Clone(prompt).(*pb.Prompt)
			prompt.MaskInput = nil
		case !isRenewed && (isReason(err, "EMBEDDING_EXPIRED") || isReason(err, "MODEL_MISMATCH")):
			isRenewed = true
			if image, err = c.encode(ctx, image.Path); err != nil {
				return image, nil, err
			}
		default:
			return image, nil, err
		}
	}
}

func (c *Client) begin() (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithTimeout(context.Background(), c.timeout)
	if c.token != "" {
		ctx = metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+c.token)
	}
	return ctx, cancel
}

// call sends again exactly when the server says, a few times, never past the deadline, nor for one reason.
func call(ctx context.Context, noRetryOn string, send func() error) error {
	deadline, _ := ctx.Deadline()
	for attempt := 1; ; attempt++ {
		err := send()
		if err == nil {
			return nil
		}
		failure := failureOf(err)
		mayRetry := failure.mayRetry() && failure.Reason != noRetryOn && attempt < attempts
		if !mayRetry || !time.Now().Add(failure.RetryAfter).Before(deadline) {
			return failure
		}
		time.Sleep(failure.RetryAfter)
	}
}

func isReason(err error, reason string) bool {
	var failure *Failure
	return errors.As(err, &failure) && failure.Reason == reason
}

func handle(path string, info *pb.EmbeddingInfo, isSent bool) Image {
	return Image{path, info.EmbeddingKey, info.ImageSize.Width, info.ImageSize.Height, isSent}
}
