package sds

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"isthmus.dev/internal/agent/agenttest"
	"isthmus.dev/internal/agent/identity"
	"isthmus.dev/internal/envoybin"
)

const reviews = "spiffe://cluster.local/ns/shop/sa/reviews"

// serve gives the socket of a server that takes envoyUID for Envoy.
func serve(t *testing.T, src *identity.Source, envoyUID uint32, uids ...uint32) string {
	t.Helper()
	path := filepath.Join(agenttest.Dir(t), "socket")
	l, err := Listen(path, uids)
	if err != nil {
		t.Fatal(err)
	}
	s := &Server{Source: src, EnvoyUID: envoyUID, UIDs: uids, Log: slog.New(slog.DiscardHandler)}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return path
}

func dial(t *testing.T, path string) *grpc.ClientConn {
	t.Helper()
	c, err := grpc.NewClient("unix:"+path, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

var self = uint32(os.Getuid())

func TestOnlyEnvoyHasTheKey(t *testing.T) {
	src := identity.NewSource(agenttest.NewCA(t).Identity(t, reviews, time.Hour))
	for _, tc := range []struct {
		name             string
		envoy            uint32
		uids             []uint32
		sds, workloadAPI codes.Code
	}{
		{name: "envoy's uid", envoy: self, sds: codes.OK, workloadAPI: codes.OK},
		{name: "a stranger", envoy: self + 1, sds: codes.PermissionDenied, workloadAPI: codes.PermissionDenied},
		{name: "an application that is configured", envoy: self + 1, uids: []uint32{self}, sds: codes.PermissionDenied, workloadAPI: codes.OK},
	} {
		t.Run(tc.name, func(t *testing.T) {
			path := serve(t, src, tc.envoy, tc.uids...)
			_, err := secretv3.NewSecretDiscoveryServiceClient(dial(t, path)).FetchSecrets(t.Context(), &discoveryv3.DiscoveryRequest{ResourceNames: []string{Certificate, TrustBundle}})
			if got := status.Code(err); got != tc.sds {
				t.Errorf("SDS: %v, want %v", got, tc.sds)
			}
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			defer cancel()
			c, err := workloadapi.New(ctx, workloadapi.WithAddr("unix://"+path))
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			svid, err := c.FetchX509SVID(ctx)
			if got := status.Code(err); got != tc.workloadAPI {
				t.Fatalf("Workload API: %v, want %v", got, tc.workloadAPI)
			}
			if err == nil && svid.ID.String() != reviews {
				t.Errorf("SVID of %s", svid.ID)
			}
		})
	}
}

func TestWorkloadAPIFollowsRotation(t *testing.T) {
	ca := agenttest.NewCA(t)
	src := identity.NewSource(ca.Identity(t, reviews, time.Hour))
	path := serve(t, src, self)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	x, err := workloadapi.NewX509Source(ctx, workloadapi.WithClientOptions(workloadapi.WithAddr("unix://"+path)))
	if err != nil {
		t.Fatal(err)
	}
	defer x.Close()
	next := ca.Identity(t, reviews, time.Hour)
	src.Set(next)
	for {
		svid, err := x.GetX509SVID()
		if err != nil {
			t.Fatal(err)
		}
		if svid.Certificates[0].Equal(next.Chain[0]) {
			break
		}
		if err := x.WaitUntilUpdated(ctx); err != nil {
			t.Fatal(err)
		}
	}
	if b, err := x.GetX509BundleForTrustDomain(spiffeid.RequireTrustDomainFromString("cluster.local")); err != nil || !b.HasX509Authority(ca.Root) {
		t.Errorf("bundle: %v", err)
	}
}

func TestListenRefusesAnotherAgentsSocket(t *testing.T) {
	src := identity.NewSource(agenttest.NewCA(t).Identity(t, reviews, time.Hour))
	path := serve(t, src, self)
	if _, err := Listen(path, nil); err == nil || !strings.Contains(err.Error(), "another agent") {
		t.Errorf("second agent: %v", err)
	}
	st, err := os.Stat(path)
	if err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", st.Mode(), err)
	}
}

func TestDelta(t *testing.T) {
	ca := agenttest.NewCA(t)
	src := identity.NewSource(ca.Identity(t, reviews, time.Hour))
	stream, err := secretv3.NewSecretDiscoveryServiceClient(dial(t, serve(t, src, self))).DeltaSecrets(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(&discoveryv3.DeltaDiscoveryRequest{ResourceNamesSubscribe: []string{Certificate, "no such"}}); err != nil {
		t.Fatal(err)
	}
	first, err := stream.Recv()
	if err != nil {
		t.Fatal(err)
	}
	if len(first.Resources) != 1 || len(first.RemovedResources) != 1 {
		t.Fatalf("got %d resources, %v removed", len(first.Resources), first.RemovedResources)
	}
	if err := stream.Send(&discoveryv3.DeltaDiscoveryRequest{ResponseNonce: first.Nonce, ResourceNamesUnsubscribe: []string{"no such"}}); err != nil {
		t.Fatal(err)
	}
	next := ca.Identity(t, reviews, time.Hour)
	src.Set(next)
	for {
		resp, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		if len(resp.Resources) == 1 && resp.Resources[0].Version == version(next) {
			break
		}
	}
}

// Requests go through one Envoy twice: in by plaintext, over mTLS to itself.
func TestRotationUnderLoad(t *testing.T) {
	ca := agenttest.NewCA(t)
	src := identity.NewSource(ca.Identity(t, reviews, time.Hour))
	front, mtls := agenttest.Address(t), agenttest.Address(t)
	startEnvoy(t, serve(t, src, self), front, mtls)
	kept := &http.Client{Timeout: 10 * time.Second}
	fresh := &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	for end := time.Now().Add(30 * time.Second); request(kept, front) != nil; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("Envoy did not get its certificates")
		}
	}
	var n atomic.Int64
	failed := make(chan error, 2)
	ctx, cancel := context.WithCancel(t.Context())
	for _, c := range []*http.Client{kept, fresh} {
		go func() {
			for ctx.Err() == nil {
				if err := request(c, front); err != nil {
					failed <- err
					return
				}
				n.Add(1)
				time.Sleep(time.Millisecond) // the machine is shared
			}
			failed <- nil
		}()
	}
	const rotations = 10
	for range rotations {
		id := ca.Identity(t, reviews, time.Hour)
		src.Set(id)
		for end := time.Now().Add(10 * time.Second); presented(t, ca, mtls) != id.Chain[0].SerialNumber.String(); time.Sleep(10 * time.Millisecond) {
			if time.Now().After(end) {
				t.Fatal("new connections have the old certificate")
			}
		}
	}
	cancel()
	for range 2 {
		if err := <-failed; err != nil {
			t.Errorf("a request failed: %v", err)
		}
	}
	if n.Load() < rotations {
		t.Errorf("only %d requests", n.Load())
	}
	t.Logf("%d requests over %d rotations", n.Load(), rotations)
}

// presented is the serial number of the certificate that a new connection sees.
func presented(t *testing.T, ca *agenttest.CA, address string) string {
	t.Helper()
	client := ca.Identity(t, "spiffe://cluster.local/ns/shop/sa/client", time.Minute)
	c, err := tls.Dial("tcp", address, &tls.Config{
		Certificates: []tls.Certificate{*client.Certificate()},
		// The serial number is all that is wanted of it.
		InsecureSkipVerify: true,
	})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	return c.ConnectionState().PeerCertificates[0].SerialNumber.String()
}

func request(c *http.Client, address string) error {
	resp, err := c.Post("http://"+address+"/", "text/plain", strings.NewReader("x"))
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if _, err := io.Copy(io.Discard, resp.Body); err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		return errors.New(resp.Status)
	}
	return nil
}

func startEnvoy(t *testing.T, socket, front, mtls string) {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("testdata", "mtls.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	frontPort, mtlsPort := port(front), port(mtls)
	config := strings.NewReplacer("SOCKET", socket, "FRONT_PORT", frontPort, "MTLS_PORT", mtlsPort).Replace(string(text))
	path := filepath.Join(t.TempDir(), "envoy.yaml")
	if err := os.WriteFile(path, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(envoybin.ForTest(t), "-c", path, "--disable-hot-restart", "--concurrency", "1", "-l", "error")
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
}

func port(address string) string {
	_, p, err := net.SplitHostPort(address)
	if err != nil {
		panic(fmt.Sprintf("address of our own making: %v", err))
	}
	return p
}
