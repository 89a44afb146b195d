package envoy

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"flag"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	bootstrapv3 "github.com/envoyproxy/go-control-plane/envoy/config/bootstrap/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/router/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/upstreams/http/v3"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"

	agentv1 "isthmus.dev/api/agent/v1"
	"isthmus.dev/internal/envoybin"
)

var update = flag.Bool("update", false, "write testdata again")

func example() Bootstrap {
	return Bootstrap{
		Membership: &agentv1.Membership{
			TrustDomain: "cluster.local", Namespace: "shop", ServiceAccount: "reviews", Name: "vm-1", Workload: "reviews",
			Labels: map[string]string{"app": "reviews", "version": "v2"}, Network: "vms", Cluster: "Kubernetes", MeshId: "cluster.local",
			ClusterDomain: "cluster.local", Addresses: []string{"192.0.2.7"}, Locality: "eu/eu-1",
		},
		Principal: "spiffe://cluster.local/ns/shop/sa/reviews", Address: "192.0.2.7",
		XDSSocket: "/run/isthmus/xds.sock", SDSSocket: "/var/run/secrets/workload-spiffe-uds/socket",
		Admin: "127.0.0.1:15000", Metrics: "[::]:15090",
	}
}

func TestBootstrapGolden(t *testing.T) {
	got, err := example().JSON()
	if err != nil {
		t.Fatal(err)
	}
	var pretty bytes.Buffer
	if err := json.Indent(&pretty, got, "", "  "); err != nil {
		t.Fatal(err)
	}
	pretty.WriteByte('\n')
	golden := filepath.Join("testdata", "bootstrap.json")
	if *update {
		if err := os.WriteFile(golden, pretty.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(pretty.Bytes(), want) {
		t.Errorf("differs from %s (-update writes it):\n%s", golden, pretty.Bytes())
	}
}

// Every field is one of the API that we build with, none is mistyped.
func TestBootstrapIsTyped(t *testing.T) {
	b, err := example().JSON()
	if err != nil {
		t.Fatal(err)
	}
	p := &bootstrapv3.Bootstrap{}
	if err := protojson.Unmarshal(b, p); err != nil {
		t.Fatal(err)
	}
	if got := p.GetNode().GetId(); got != example().NodeID() {
		t.Errorf("node %s", got)
	}
}

func TestBootstrapIsValid(t *testing.T) {
	b, err := example().JSON()
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "bootstrap.json")
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(envoybin.ForTest(t), "--mode", "validate", "-c", path, "-l", "warning").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
}

func TestEnvironment(t *testing.T) {
	env, err := example().Environment()
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"ISTHMUS_WORKLOAD=reviews", "ISTHMUS_NAMESPACE=shop", "ISTHMUS_PRINCIPAL=spiffe://cluster.local/ns/shop/sa/reviews",
		"ISTHMUS_APP=reviews", "ISTHMUS_VERSION=v2", "ISTHMUS_CANONICAL_SERVICE=reviews", "ISTHMUS_CANONICAL_REVISION=v2",
		"ISTHMUS_CLUSTER=Kubernetes", "ISTHMUS_PEER_ID=sidecar~192.0.2.7~vm-1.shop~shop.svc.cluster.local",
	} {
		if !slices.Contains(env, want) {
			t.Errorf("%s is missing in %q", want, env)
		}
	}
	var peer structpb.Value
	for _, e := range env {
		if b64, ok := strings.CutPrefix(e, "ISTHMUS_PEER_METADATA="); ok {
			raw, err := base64.StdEncoding.DecodeString(b64)
			if err != nil {
				t.Fatal(err)
			}
			if err := proto.Unmarshal(raw, &peer); err != nil {
				t.Fatal(err)
			}
		}
	}
	fields := peer.GetStructValue().GetFields()
	if len(fields) != 8 || fields["principal"].GetStringValue() != "spiffe://cluster.local/ns/shop/sa/reviews" {
		t.Errorf("peer metadata: %v", fields)
	}
}

func TestEnvironmentOfNobody(t *testing.T) {
	b := example()
	b.Membership = &agentv1.Membership{Namespace: "shop", Workload: "reviews"}
	env, err := b.Environment()
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"ISTHMUS_APP=unknown", "ISTHMUS_VERSION=unknown", "ISTHMUS_CANONICAL_SERVICE=reviews", "ISTHMUS_CANONICAL_REVISION=latest"} {
		if !slices.Contains(env, want) {
			t.Errorf("%s is missing in %q", want, env)
		}
	}
}
