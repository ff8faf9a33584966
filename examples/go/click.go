// Clicks on a photo, refines the mask with further clicks, and writes it as a PNG to lay over the photo.
//
//	go run . --click 131,410 --click 127,189 --out mask.png photo.jpg
//	go run . --click 131,410:1 --click 600,370:0 --ca ca.pem --token-file token photo.jpg
package main

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"flag"
	"fmt"
	"os"
	"regexp"
	"strconv"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	pb "splitsamclick/splitsam/v1"
)

var clickForm = regexp.MustCompile(`^([\d.]+),([\d.]+)(?::([01]))?$`)

type clicks []*pb.Point

func (c *clicks) String() string { return "" }

func (c *clicks) Set(text string) error {
	parts := clickForm.FindStringSubmatch(text)
	if parts == nil {
		return errors.New("must be X,Y, X,Y:1 or X,Y:0")
	}
	x, _ := strconv.ParseFloat(parts[1], 32)
	y, _ := strconv.ParseFloat(parts[2], 32)
	label := pb.PointLabel_POINT_LABEL_FOREGROUND
	if parts[3] == "0" {
		label = pb.PointLabel_POINT_LABEL_BACKGROUND
	}
	*c = append(*c, &pb.Point{X: float32(x), Y: float32(y), Label: label})
	return nil
}

func main() {
	var points clicks
	encoder := flag.String("encoder", "127.0.0.1:50051", "address of the encoder service")
	decoder := flag.String("decoder", "127.0.0.1:50052", "address of the decoder service")
	tokenFile := flag.String("token-file", "", "file with the bearer token to send")
	ca := flag.String("ca", "", "authorities to trust, PEM; uses TLS")
	cert := flag.String("cert", "", "the caller's certificate, PEM")
	key := flag.String("key", "", "its key, PEM")
	serverName := flag.String("server-name", "", "name in the services' certificate, if not that of the address")
	timeout := flag.Duration("timeout", 30*time.Second, "longest wait for the image, and for each click")
	out := flag.String("out", "", "PNG to write")
	flag.Var(&points, "click", "X,Y[:1|:0]; may be repeated")
	flag.Parse()
	if flag.NArg() != 1 || len(points) == 0 {
		flag.Usage()
		os.Exit(2)
	}
	security, err := transport(*ca, *cert, *key, *serverName)
	if err == nil {
		err = run(flag.Arg(0), points, *encoder, *decoder, *tokenFile, *out, *timeout, security)
	}
	var failure *Failure
	if errors.As(err, &failure) && failure.RequestID != "" {
		err = fmt.Errorf("%w, request %s", err, failure.RequestID)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(
	path string, points clicks, encoder, decoder, tokenFile, out string, timeout time.Duration, security grpc.DialOption,
) error {
	token, err := readToken(tokenFile)
	if err != nil {
		return err
	}
	encoders, err := grpc.Dial(encoder, security)
	if err != nil {
		return err
	}
	defer encoders.Close()
	decoders, err := grpc.Dial(decoder, security)
	if err != nil {
		return err
	}
	defer decoders.Close()
	sam := NewClient(encoders, decoders, token, timeout)
	image, err := sam.Encode(path)
	if err != nil {
		return err
	}
	state := map[bool]string{true: "sent and encoded", false: "was encoded before"}[image.Sent]
	fmt.Printf("%s: %d x %d, %s\n", path, image.Width, image.Height, state)
	var mask *pb.PredictedMask
	for number := 1; number <= len(points); number++ {
		// Each further click refines what the clicks before it gave: all points so far, and the token of the last mask.
		prompt := &pb.Prompt{Points: points[:number]}
		if mask.GetRefinementToken() != "" {
			prompt.MaskInput = &pb.Prompt_RefinementToken{RefinementToken: mask.RefinementToken}
		}
		var masks []*pb.PredictedMask
		image, masks, err = sam.Predict(image, prompt, &pb.OutputOptions{RefinementTokens: true})
		if err != nil {
			return err
		}
		mask = masks[0]
		fmt.Printf("%d clicks: score %.3f, area %d px\n", number, mask.PredictedIou, mask.AreaPx)
	}
	if out == "" {
		return nil
	}
	file, err := os.Create(out)
	if err != nil {
		return err
	}
	defer file.Close()
	return writeOverlay(file, mask.Rle)
}

func readToken(path string) (string, error) {
	if path == "" {
		return "", nil
	}
	token, err := os.ReadFile(path)
	return strings.TrimSpace(string(token)), err
}

// transport is TLS with the files that are given, or plain text without any.
func transport(ca, cert, key, serverName string) (grpc.DialOption, error) {
	if ca == "" && cert == "" && serverName == "" {
		return grpc.WithInsecure(), nil
	}
	config := &tls.Config{ServerName: serverName}
	if ca != "" {
		authorities, err := os.ReadFile(ca)
		if err != nil {
			return nil, err
		}
		config.RootCAs = x509.NewCertPool()
		config.RootCAs.AppendCertsFromPEM(authorities)
	}
	if cert != "" {
		pair, err := tls.LoadX509KeyPair(cert, key)
		if err != nil {
			return nil, err
		}
		config.Certificates = []tls.Certificate{pair}
	}
	return grpc.WithTransportCredentials(credentials.NewTLS(config)), nil
}
