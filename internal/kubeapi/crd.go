package kubeapi

import (
	"context"
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	"k8s.io/apiextensions-apiserver/pkg/client/clientset/clientset"
	crdclient "k8s.io/apiextensions-apiserver/pkg/client/clientset/clientset/typed/apiextensions/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/yaml"
)

// Istio's definitions are those of the istio.io/api that go.mod pins.
//go:generate sh -c "install -m 644 $(go list -m -f '{{.Dir}}' istio.io/api)/kubernetes/customresourcedefinitions.gen.yaml crds/istio.yaml"

//go:embed crds/*.yaml
var crdFiles embed.FS

const (
	fieldManager = "isthmusd"
	// annotationContent is the SHA-256 of the definition as it is embedded here: it
	// says that we installed it, and whether it is the one of this release.
	annotationContent = "isthmus.dev/content-sha256"

	parallelCRDs     = 4
	establishedPoll  = 50 * time.Millisecond
	establishedLimit = time.Minute
)

// InstallCRDs installs Istio's definitions and ours by server-side apply, and waits
// until all are served. It does nothing for those of this release that are there,
// and leaves alone what others installed: a cluster's Istio knows its own version.
func InstallCRDs(ctx context.Context, cfg *rest.Config) error {
	cfg = rest.CopyConfig(cfg)
	cfg.ContentType = runtime.ContentTypeProtobuf // of definitions as JSON there are megabytes
	clients, err := clientset.NewForConfig(cfg)
	if err != nil {
		return fmt.Errorf("install CRDs: %w", err)
	}
	crds := clients.ApiextensionsV1().CustomResourceDefinitions()
	found, err := crds.List(ctx, metav1.ListOptions{})
	if err != nil {
		return fmt.Errorf("install CRDs: list those installed: %w", err)
	}
	definitions, err := embeddedCRDs()
	if err != nil {
		return fmt.Errorf("install CRDs: %w", err)
	}
	todo := outstanding(definitions, found.Items)
	var group errgroup.Group
	group.SetLimit(parallelCRDs)
	for _, d := range todo {
		group.Go(func() error {
			if err := d.install(ctx, crds); err != nil {
				return fmt.Errorf("install CRD %s: %w", d.name, err)
			}
			return nil
		})
	}
	return group.Wait()
}

// definition is an embedded CRD, not parsed yet: that takes longer than all the rest
// where nothing is to be done.
type definition struct {
	name    string
	content []byte
	sum     string
}

func embeddedCRDs() ([]definition, error) {
	files, err := crdFiles.ReadDir("crds")
	if err != nil {
		return nil, err
	}
	var all []definition
	for _, f := range files {
		b, err := crdFiles.ReadFile("crds/" + f.Name())
		if err != nil {
			return nil, err
		}
		for doc := range strings.SplitSeq(string(b), "\n---\n") {
			if strings.TrimSpace(doc) == "" {
				continue
			}
			name, err := nameOf(doc)
			if err != nil {
				return nil, fmt.Errorf("crds/%s: %w", f.Name(), err)
			}
			sum := sha256.Sum256([]byte(doc))
			all = append(all, definition{name: name, content: []byte(doc), sum: hex.EncodeToString(sum[:])})
		}
	}
	return all, nil
}

// nameOf is metadata.name of a CRD's text: the only key "name" at that depth.
func nameOf(doc string) (string, error) {
	for line := range strings.SplitSeq(doc, "\n") {
		if name, ok := strings.CutPrefix(line, "  name: "); ok {
			return strings.TrimSpace(name), nil
		}
	}
	return "", fmt.Errorf("a definition without metadata.name")
}

// outstanding are the definitions to install or to wait for.
func outstanding(all []definition, installed []apiextensionsv1.CustomResourceDefinition) []definition {
	byName := make(map[string]*apiextensionsv1.CustomResourceDefinition, len(installed))
	for i := range installed {
		byName[installed[i].Name] = &installed[i]
	}
	var todo []definition
	for _, d := range all {
		crd, ok := byName[d.name]
		if !ok {
			todo = append(todo, d)
			continue
		}
		sum, ours := crd.Annotations[annotationContent]
		if ours && (sum != d.sum || !established(crd)) {
			todo = append(todo, d)
		}
	}
	return todo
}

func (d definition) install(ctx context.Context, crds crdclient.CustomResourceDefinitionInterface) error {
	patch, err := d.patch()
	if err != nil {
		return err
	}
	force := true
	crd, err := crds.Patch(ctx, d.name, types.ApplyPatchType, patch, metav1.PatchOptions{FieldManager: fieldManager, Force: &force})
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, establishedLimit)
	defer cancel()
	for !established(crd) {
		if refused := condition(crd, apiextensionsv1.NamesAccepted); refused != nil && refused.Status == apiextensionsv1.ConditionFalse {
			return fmt.Errorf("its names are taken by another: %s", refused.Message)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("not established: %w", ctx.Err())
		case <-time.After(establishedPoll):
		}
		if crd, err = crds.Get(ctx, d.name, metav1.GetOptions{}); err != nil {
			return err
		}
	}
	return nil
}

// patch is the definition as JSON, marked as ours.
func (d definition) patch() ([]byte, error) {
	var object map[string]any
	if err := yaml.Unmarshal(d.content, &object); err != nil {
		return nil, fmt.Errorf("parse: %w", err)
	}
	metadata, ok := object["metadata"].(map[string]any)
	if !ok {
		return nil, fmt.Errorf("parse: no metadata")
	}
	annotations, _ := metadata["annotations"].(map[string]any)
	if annotations == nil {
		annotations = map[string]any{}
		metadata["annotations"] = annotations
	}
	annotations[annotationContent] = d.sum
	return json.Marshal(object)
}

func established(crd *apiextensionsv1.CustomResourceDefinition) bool {
	c := condition(crd, apiextensionsv1.Established)
	return c != nil && c.Status == apiextensionsv1.ConditionTrue
}

func condition(crd *apiextensionsv1.CustomResourceDefinition, kind apiextensionsv1.CustomResourceDefinitionConditionType) *apiextensionsv1.CustomResourceDefinitionCondition {
	for i := range crd.Status.Conditions {
		if crd.Status.Conditions[i].Type == kind {
			return &crd.Status.Conditions[i]
		}
	}
	return nil
}
