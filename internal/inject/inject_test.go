package inject

import (
	"encoding/json"
	"flag"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	jsonpatch "gopkg.in/evanphx/json-patch.v4"
	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/yaml"
)

var update = flag.Bool("update", false, "rewrite the golden files")

func newInjector(t testing.TB) *Injector {
	t.Helper()
	i, err := New(Config{Image: "isthmus/agent:dev", RewriteAppProbes: true, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	return i
}

// mutated applies the mutation to the pod's JSON.
func mutated(t testing.TB, i *Injector, raw []byte) ([]byte, Mutation) {
	t.Helper()
	var pod corev1.Pod
	if err := json.Unmarshal(raw, &pod); err != nil {
		t.Fatal(err)
	}
	m, err := i.Mutate(&pod, pod.Namespace)
	if err != nil {
		t.Fatal(err)
	}
	if len(m.Patch) == 0 {
		return raw, m
	}
	encoded, err := json.Marshal(m.Patch)
	if err != nil {
		t.Fatal(err)
	}
	patch, err := jsonpatch.DecodePatch(encoded)
	if err != nil {
		t.Fatal(err)
	}
	out, err := patch.Apply(raw)
	if err != nil {
		t.Fatalf("the patch does not apply: %v\n%s", err, encoded)
	}
	return out, m
}

func TestPodsAreInjected(t *testing.T) {
	inputs, err := filepath.Glob("testdata/*.in.yaml")
	if err != nil || len(inputs) == 0 {
		t.Fatalf("no inputs: %v", err)
	}
	for _, in := range inputs {
		t.Run(strings.TrimSuffix(filepath.Base(in), ".in.yaml"), func(t *testing.T) {
			text, err := os.ReadFile(in)
			if err != nil {
				t.Fatal(err)
			}
			raw, err := yaml.YAMLToJSON(text)
			if err != nil {
				t.Fatal(err)
			}
			i := newInjector(t)
			out, m := mutated(t, i, raw)
			if again, second := mutated(t, i, out); len(second.Patch) > 0 {
				t.Errorf("injecting twice changes the pod again:\n%s", cmp.Diff(string(out), string(again)))
			}
			got, err := yaml.JSONToYAML(out)
			if err != nil {
				t.Fatal(err)
			}
			for _, w := range m.Warnings {
				got = append(got, "# warning: "+w+"\n"...)
			}
			golden := strings.Replace(in, ".in.yaml", ".out.yaml", 1)
			if *update {
				if err := os.WriteFile(golden, got, 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(string(want), string(got)); d != "" {
				t.Errorf("-want +got:\n%s", d)
			}
		})
	}
}

func TestWhoGetsASidecar(t *testing.T) {
	plain := []corev1.Container{{Name: "app", Image: "app"}}
	for name, c := range map[string]struct {
		namespace   string
		labels      map[string]string
		annotations map[string]string
		spec        corev1.PodSpec
		want        bool
	}{
		"asked by the namespace":                {want: true},
		"asked by the label":                    {labels: map[string]string{labelInject: "true"}, want: true},
		"refused by the label":                  {labels: map[string]string{labelInject: "false"}},
		"refused by the annotation":             {annotations: map[string]string{annotationInject: "no"}},
		"the label wins":                        {labels: map[string]string{labelInject: "true"}, annotations: map[string]string{annotationInject: "false"}, want: true},
		"the label wins, refusing":              {labels: map[string]string{labelInject: "false"}, annotations: map[string]string{annotationInject: "true"}},
		"kube-system, even if asked":            {namespace: "kube-system", labels: map[string]string{labelInject: "true"}},
		"on the host's network":                 {spec: corev1.PodSpec{HostNetwork: true, Containers: plain}},
		"an annotation copied from another pod": {annotations: map[string]string{annotationStatus: "{}"}, want: true},
		"injected already": {annotations: map[string]string{annotationStatus: "{}"}, spec: corev1.PodSpec{
			Containers: plain, InitContainers: []corev1.Container{{Name: proxyName, Image: "x"}},
		}},
	} {
		t.Run(name, func(t *testing.T) {
			pod := &corev1.Pod{Spec: c.spec}
			pod.Labels, pod.Annotations = c.labels, c.annotations
			if pod.Spec.Containers == nil {
				pod.Spec.Containers = plain
			}
			namespace := c.namespace
			if namespace == "" {
				namespace = "shop"
			}
			m, err := newInjector(t).Mutate(pod, namespace)
			if err != nil {
				t.Fatal(err)
			}
			if got := len(m.Patch) > 0; got != c.want {
				t.Errorf("injected: %v, want %v (%s)", got, c.want, m.Skipped)
			}
			if !c.want && m.Skipped == "" {
				t.Error("no reason is given")
			}
		})
	}
}

// TestNoOutboundCapture: an empty list of ranges captures nothing, as in Istio.
func TestNoOutboundCapture(t *testing.T) {
	pod := &corev1.Pod{}
	pod.Annotations = map[string]string{annotationIncludeOutboundRanges: "", annotationExcludeOutboundRanges: "10.0.0.0/8"}
	c, err := newInjector(t).captureInit(pod)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, a := range c.Args {
		if strings.Contains(a, "outbound-ip-ranges") {
			got = append(got, a)
		}
	}
	if len(got) != 1 || got[0] != "--exclude-outbound-ip-ranges=0.0.0.0/0,::/0" {
		t.Errorf("arguments %q", got)
	}
}

func TestMistakesAreNamed(t *testing.T) {
	app := corev1.Container{Name: "app", Image: "app"}
	badProbe := app
	badProbe.ReadinessProbe = &corev1.Probe{ProbeHandler: corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{}}}
	badProbe.ReadinessProbe.HTTPGet.Port.Type, badProbe.ReadinessProbe.HTTPGet.Port.StrVal = 1, "web"
	for name, c := range map[string]struct {
		annotations map[string]string
		container   corev1.Container
		want        string
	}{
		"port":        {map[string]string{annotationExcludeInboundPorts: "80,ninety"}, app, `"ninety" is not a port`},
		"all ports":   {map[string]string{annotationExcludeOutboundPorts: "*"}, app, `"*" is not a port`},
		"range":       {map[string]string{annotationIncludeOutboundRanges: "10.0.0.1"}, app, `"10.0.0.1" is not a CIDR`},
		"quantity":    {map[string]string{annotationCPU: "fast"}, app, annotationCPU},
		"switch":      {map[string]string{annotationProbes: "maybe"}, app, "neither true nor false"},
		"probe port":  {nil, badProbe, `container app: readinessProbe: the container has no port named "web"`},
		"only itself": {nil, corev1.Container{Name: proxyName, Image: autoImage}, "no container but istio-proxy"},
	} {
		t.Run(name, func(t *testing.T) {
			pod := &corev1.Pod{Spec: corev1.PodSpec{Containers: []corev1.Container{c.container}}}
			pod.Annotations = c.annotations
			_, err := newInjector(t).Mutate(pod, "shop")
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error %v, want one with %q", err, c.want)
			}
		})
	}
	if _, err := New(Config{}); err == nil {
		t.Error("an injector without an image was made")
	}
}
