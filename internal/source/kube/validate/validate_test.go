package validate

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	networking "istio.io/api/networking/v1alpha3"
	security "istio.io/api/security/v1beta1"
	"sigs.k8s.io/yaml"
)

type istioMessage interface{ UnmarshalJSON([]byte) error }

// kinds by the name of their file in testdata.
var kinds = map[string]func() (istioMessage, func() []string){
	"virtualservice": func() (istioMessage, func() []string) {
		m := &networking.VirtualService{}
		return m, func() []string { return VirtualService(m) }
	},
	"destinationrule": func() (istioMessage, func() []string) {
		m := &networking.DestinationRule{}
		return m, func() []string { return DestinationRule(m) }
	},
	"sidecar": func() (istioMessage, func() []string) {
		m := &networking.Sidecar{}
		return m, func() []string { return Sidecar(m) }
	},
	"serviceentry": func() (istioMessage, func() []string) {
		m := &networking.ServiceEntry{}
		return m, func() []string { return ServiceEntry(m) }
	},
	"workloadentry": func() (istioMessage, func() []string) {
		m := &networking.WorkloadEntry{}
		return m, func() []string { return WorkloadEntry(m) }
	},
	"workloadgroup": func() (istioMessage, func() []string) {
		m := &networking.WorkloadGroup{}
		return m, func() []string { return WorkloadGroup(m) }
	},
	"peerauthentication": func() (istioMessage, func() []string) {
		m := &security.PeerAuthentication{}
		return m, func() []string { return PeerAuthentication(m) }
	},
	"authorizationpolicy": func() (istioMessage, func() []string) {
		m := &security.AuthorizationPolicy{}
		return m, func() []string { return AuthorizationPolicy(m) }
	},
}

// testCase: want lists the beginning of each finding, in order; none is valid.
type testCase struct {
	Name string         `json:"name"`
	Spec map[string]any `json:"spec"`
	Want []string       `json:"want"`
}

func TestSpecs(t *testing.T) {
	for name, kind := range kinds {
		text, err := os.ReadFile(filepath.Join("testdata", name+".yaml"))
		if err != nil {
			t.Fatal(err)
		}
		var cases []testCase
		if err := yaml.UnmarshalStrict(text, &cases); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if len(cases) == 0 {
			t.Errorf("%s: no cases", name)
		}
		for _, c := range cases {
			t.Run(name+"/"+c.Name, func(t *testing.T) {
				encoded, err := yaml.Marshal(c.Spec)
				if err != nil {
					t.Fatal(err)
				}
				encoded, err = yaml.YAMLToJSON(encoded)
				if err != nil {
					t.Fatal(err)
				}
				spec, validate := kind()
				if err := spec.UnmarshalJSON(encoded); err != nil {
					t.Fatal(err)
				}
				got := validate()
				ok := len(got) == len(c.Want)
				for i := 0; ok && i < len(got); i++ {
					ok = strings.HasPrefix(got[i], c.Want[i])
				}
				if !ok {
					t.Errorf("-want +got:\n%s", cmp.Diff(c.Want, got))
				}
			})
		}
	}
}

// FuzzHost: what passes as a host can be part of a cluster's name and of a TLS
// name.
func FuzzHost(f *testing.F) {
	for _, s := range []string{"a.b", "*.example.com", "*", "-a", "a..b", "*.*.a", "ü.example", "a.b."} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if wildcardHost(s) == nil && (s == "" || strings.ContainsAny(s, "| \t\n/:") || strings.Count(s, "*") > 1) {
			t.Errorf("%q passes as a host", s)
		}
	})
}

// FuzzVirtualService: validation says something of any spec, and never panics.
func FuzzVirtualService(f *testing.F) {
	f.Add([]byte(`{"hosts":["a"],"http":[{"match":[{"uri":{"regex":"("}}],"route":[{"destination":{"host":"b"}}]}]}`))
	f.Add([]byte(`{"hosts":["*.a"],"tls":[{"match":[{"sniHosts":["b.a"]}],"route":[{}]}]}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		vs := &networking.VirtualService{}
		if vs.UnmarshalJSON(text) != nil {
			return
		}
		if len(VirtualService(vs)) == 0 && len(vs.GetHttp())+len(vs.GetTls())+len(vs.GetTcp()) == 0 {
			t.Error("a spec without routes is valid")
		}
	})
}
