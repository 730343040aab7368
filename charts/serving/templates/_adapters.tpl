{{/* Sidecar that keeps vLLM's adapters equal to the list in the ConfigMap. kubelet updates that file without rolling pods. */}}
{{- define "serving.adaptersContainer" -}}
image: {{ include "serving.image" . | quote }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
command: [ictx, adapters]
args:
  - --list
  - /etc/ictx/adapters/adapters.yaml
  - --to
  - /adapters
  - --base
  - {{ include "serving.modelDir" . | quote }}
  - --state
  - /run/ictx
  - --server
  - {{ include "serving.scheme" . }}://127.0.0.1:8000
  {{- if .Values.tls.enabled }}
  - --certificate
  - /etc/ictx/tls/tls.crt
  {{- end }}
  - --rank
  - {{ .Values.adapters.maxRank | int | quote }}
  - --seconds
  - {{ .Values.adapters.seconds | int | quote }}
env:
  {{- include "serving.baseEnv" . | nindent 2 }}
  {{- include "serving.registryEnv" . | nindent 2 }}
  {{- with .Values.pull.extraEnv }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
securityContext:
  {{- include "serving.containerSecurityContext" . | nindent 2 }}
resources:
  {{- toYaml .Values.adapters.resources | nindent 2 }}
# A pod gets requests when all listed adapters are loaded.
readinessProbe:
  exec: {command: [test, -e, /run/ictx/ready]}
  periodSeconds: 5
terminationMessagePolicy: FallbackToLogsOnError
volumeMounts:
  - name: adapters-list
    mountPath: /etc/ictx/adapters
    readOnly: true
  - name: adapters
    mountPath: /adapters
  - name: adapters-state
    mountPath: /run/ictx
  - name: models
    mountPath: /models
    readOnly: true
  - name: tmp
    mountPath: /tmp
  {{- if .Values.tls.enabled }}
  - name: tls
    mountPath: /etc/ictx/tls
    readOnly: true
  {{- end }}
  {{- if .Values.mlflow.caConfigMap }}
  - name: mlflow-ca
    mountPath: /etc/mlflow-ca
    readOnly: true
  {{- end }}
{{- end }}

{{- define "serving.adaptersVolumes" -}}
- name: adapters-list
  configMap:
    name: {{ include "serving.fullname" . }}-adapters
- name: adapters
  emptyDir:
    sizeLimit: {{ .Values.adapters.size }}
# The key of the container that loads adapters; it never leaves the pod.
- name: adapters-state
  emptyDir:
    medium: Memory
    sizeLimit: 1Mi
{{- end }}

{{- define "serving.checkAdapters" -}}
{{- if and .Values.adapters.serve (not .Values.adapters.enabled) }}
{{- fail "adapters.serve lists adapters, but adapters.enabled is false: set it to true" }}
{{- end }}
{{- if gt (int .Values.adapters.maxActive) (int .Values.adapters.maxLoaded) }}
{{- fail "adapters.maxActive is larger than adapters.maxLoaded: raise adapters.maxLoaded" }}
{{- end }}
{{- if gt (len .Values.adapters.serve) (int .Values.adapters.maxLoaded) }}
{{- fail (printf "adapters.serve lists %d adapters, but adapters.maxLoaded is %d: raise adapters.maxLoaded" (len .Values.adapters.serve) (int .Values.adapters.maxLoaded)) }}
{{- end }}
{{- $names := list (include "serving.servedName" .) }}
{{- range .Values.adapters.serve }}
{{- if has .name $names }}
{{- fail (printf "adapters.serve: the model or another adapter has the name %q: use another name" .name) }}
{{- end }}
{{- $names = append $names .name }}
{{- end }}
{{- end }}
